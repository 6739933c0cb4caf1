"""S4ND with S4's kernels, under the authors' names, against dense matrices and the outer product of the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vim.layers import S4, S4ND

H, HALF = 4, 3  # channels and half the states
RANKS = {"legs": 1, "legt": 2, "fout": 1}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def official(dim, measure="legs", n_ssm=H, l_kernel=0, delta=0.2):
    """A random state dict with the authors' names and shapes, in fp64. n_ssm: systems that the channels share."""

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64)

    weights = {
        "D": random(1, H),
        "output_linear.0.weight": random(2 * H, H),
        "output_linear.0.bias": random(2 * H),
    }
    for i in range(dim):
        weights |= {
            f"kernel.{i}.inv_dt": math.log(delta) + 0.1 * random(H, 1),
            f"kernel.{i}.A_real": -0.7 + 0.1 * random(n_ssm, HALF),
            f"kernel.{i}.A_imag": (3 + 2 * random(n_ssm, HALF)).abs(),
            f"kernel.{i}.B": random(1, n_ssm, HALF, 2),
            f"kernel.{i}.C": random(2, H, HALF, 2),
            f"kernel.{i}.P": 0.5 * random(RANKS[measure], n_ssm, HALF, 2),
            f"kernel.{i}.l_kernel": torch.tensor(l_kernel),
        }
    return weights


def load(weights, dim, measure="legs", **options):
    model = nn.Sequential(S4ND(H, 2 * HALF, dim, measure=measure, **options).double())
    model.load_state_dict({f"0.{name}": value for name, value in weights.items()})
    return model[0]


def lengths(mixer):
    return [int(value) for name, value in mixer.named_buffers() if name.endswith("l_kernel")]


def lags(w, size, rate=1.0):
    """Both kernels of an axis by powers of a dense matrix: at lags 1 - size .. size - 1, (H, 2 size - 1)."""
    A, B, P, C = (
        torch.complex(-w["A_real"].exp(), -w["A_imag"]),
        *(torch.view_as_complex(w[name]) for name in ("B", "P", "C")),
    )
    A, B, P = (torch.cat([t] * (H // A.shape[0]), -2) for t in (A, B[0], P))
    A, B, P, C = (torch.cat((t, t.conj()), -1) for t in (A, B, P, C))
    A = torch.diag_embed(A) - torch.einsum("rhn, rhm -> hnm", P, P.conj())
    identity = torch.eye(2 * HALF, dtype=A.dtype)

    def discrete(delta):
        inverse = torch.linalg.inv(identity - delta / 2 * A)
        return inverse @ (identity + delta / 2 * A), delta * inverse @ B[..., None]

    delta = w["inv_dt"].exp()[..., None]
    if w["l_kernel"]:  # the file holds C (I - dA^L)
        C = C[:, :, None] @ torch.linalg.inv(identity - torch.linalg.matrix_power(discrete(delta)[0], w["l_kernel"]))
        C = C[:, :, 0]
    dA, state = discrete(rate * delta)
    responses = []
    for _ in range(size):
        responses.append((C[..., None, :] @ state)[..., 0, 0].real)
        state = dA @ state
    forward, backward = torch.stack(responses, -1)
    return torch.cat((backward[:, : size - 1].flip(-1), forward), -1)


def by_hand(weights, x, rate=1.0):
    """The linear part for x (batch, *sizes, H), by the product of the kernels of all axes."""
    sizes = x.shape[1:-1]
    whole = torch.ones(H, dtype=torch.float64)
    for i, size in enumerate(sizes):
        own = {name.split(".")[-1]: value for name, value in weights.items() if name.startswith(f"kernel.{i}.")}
        axis = lags(own, size, rate)
        whole = whole[..., None] * axis.view(H, *[1] * i, -1)
    pad = [size - 1 for size in reversed(sizes) for _ in range(2)]
    turned = whole.flip(*range(1, whole.ndim))[:, None]
    y = CONVOLUTIONS[len(sizes)](F.pad(x.movedim(-1, 1), pad), turned, groups=H)
    return y.movedim(1, -1) + weights["D"][0] * x


@pytest.mark.parametrize("n_ssm", [1, 2, H])
@pytest.mark.parametrize(
    ("measure", "sizes"), [("legs", (5, 8)), ("legt", (7, 2)), ("fout", (1, 9)), ("legs", (6,)), ("legs", (3, 4, 2))]
)
def test_output_and_gradients(measure, sizes, n_ssm, relative_error):
    weights = official(len(sizes), measure, n_ssm, l_kernel=9)
    mixer = load(weights, len(sizes), measure)
    x = torch.randn(2, *sizes, H, dtype=torch.float64, requires_grad=True)
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in weights.items()}
    want, cotangent = by_hand(leaves, x), torch.randn_like(x)
    assert relative_error(mixer.convolve(x), want) < 1e-10
    out = F.linear(F.gelu(want), weights["output_linear.0.weight"], weights["output_linear.0.bias"])
    assert relative_error(mixer(x), F.glu(out, -1)) < 1e-10
    trained = {name: value for name, value in leaves.items() if name.startswith("kernel") and value.requires_grad}
    wanted = dict(
        zip(("x", *trained), torch.autograd.grad((want * cotangent).sum(), (x, *trained.values())), strict=True)
    )
    parameters = dict(mixer.named_parameters())
    (mixer.convolve(x) * cotangent).sum().backward()
    assert relative_error(x.grad, wanted.pop("x")) < 1e-10
    for name, other in wanted.items():
        grad = parameters[name.replace("inv_dt", "log_dt").replace("A_real", "A_log")].grad
        if name.endswith(("A_real", "A_imag", "B", "P")):  # the authors' systems that channels share
            axis = int(name.endswith("P"))
            grad = grad.unflatten(axis, (H // n_ssm, n_ssm)).sum(axis)
        if name.endswith("A_imag"):
            grad = -grad
        assert relative_error(grad.reshape(other.shape), other) < 1e-9, name


@torch.no_grad()
def test_an_image_makes_the_kernels_longer(relative_error):
    """Of each axis by itself. Outputs of other sizes do not change, and the state dict knows the lengths."""
    weights = official(2)
    mixer = load(weights, 2)
    for sizes, kept in (((4, 6), [4, 6]), ((3, 6), [4, 6]), ((2, 11), [4, 11]), ((9, 7), [9, 11]), ((4, 6), [9, 11])):
        x = torch.randn(1, *sizes, H, dtype=torch.float64)
        assert relative_error(mixer.convolve(x), by_hand(weights, x)) < 1e-10
        assert lengths(mixer) == kept
    again = S4ND(H, 2 * HALF, measure="legs", l_max=5).double()
    again.load_state_dict(mixer.state_dict())
    assert_close(again(x), mixer(x), atol=0, rtol=0)


@torch.no_grad()
def test_l_max():
    """One size or one per axis; it changes nothing but the lengths."""
    models = []
    for l_max in (None, 7, (7, 5)):
        torch.manual_seed(1)
        models.append(S4ND(H, 2 * HALF, measure="fout", l_max=l_max).double())
    assert [lengths(model) for model in models] == [[0, 0], [7, 7], [7, 5]]
    x = torch.randn(1, 6, 8, H, dtype=torch.float64)
    for model in models[1:]:
        assert_close(model(x), models[0](x))


@torch.no_grad()
def test_another_resolution(relative_error):
    """Steps of half the length. C keeps the correction for its length at the resolution in training: no equality."""
    weights = official(2, l_kernel=16, delta=0.01) | {"D": torch.zeros(1, H, dtype=torch.float64)}
    x = torch.randn(1, 10, 12, H, dtype=torch.float64)
    mixer = load(weights, 2)
    fine = by_hand(weights, x, 0.5)
    assert relative_error(mixer.convolve(x, 0.5), fine) < 1e-3
    assert relative_error(mixer.convolve(x), fine) > 1


@torch.no_grad()
@pytest.mark.parametrize("measure", RANKS)
def test_along_one_axis_it_is_s4_in_both_directions(measure):
    """Initial values, too."""
    layers = []
    for make in (lambda **kw: S4ND(H, 8, 1, **kw), lambda **kw: S4(H, 8, bidirectional=True, **kw)):
        torch.manual_seed(1)
        layers.append(make(measure=measure, l_max=6, dt_min=0.01, dt_max=0.02))
    one, other = layers
    assert_close(
        {name.replace("kernel.0.", "kernel."): value for name, value in one.state_dict().items()},
        dict(other.state_dict()),
    )
    x = torch.randn(2, 9, H)
    assert_close(one(x), other(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"measure": "legs", "bandlimit": 0.5},
            "S4's kernels have no bandlimit, got 0.5; leave it out, or leave measure",
        ),
        ({"measure": "legs", "init": "inv"}, "S4's kernels have no init, got 'inv'"),
        ({"measure": "legs", "rule": "bilinear"}, "S4's kernels have no rule, got 'bilinear'"),
        ({"l_max": 32}, "S4D's kernels have no l_max, got 32; leave it out, or give S4's measure"),
        ({"measure": "legs", "l_max": (32, 32, 32)}, r"l_max must be one size or 2, one per axis, got \(32, 32, 32\)"),
        ({"measure": "hippo"}, "measure must be one of 'legs', 'legt', 'fout', got 'hippo'"),
    ],
    ids=str,
)
def test_options_of_the_other_kernels(options, message):
    with pytest.raises(ValueError, match=message):
        S4ND(H, 8, **options)
