"""Mamba2 and BiMamba2 against their equations written out, with the authors' names and layouts."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from vim.layers import BiMamba2, Mamba2, Mamba2Cache, recompute_all_but_scans
from vim_kernels import available_backends

SIZES = {"d_model": 12, "d_state": 5, "d_conv": 3, "head_dim": 4, "groups": 2}  # d_inner 24, 6 heads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shaken(mixer):
    """In fp64, with random offsets: initial values such as D = 1 would hide errors."""
    for p in mixer.double().parameters():
        p.data += 0.3 * torch.randn_like(p)
    return mixer


def one_direction(xBC, dt, conv_weight, conv_bias, A_log, D, dt_bias):
    """(B, L, 24 + 2 * 2 * 5) and (B, L, 6) -> (B, L, 24), before gate and norm."""
    batch, length, channels = xBC.shape
    xBC = F.silu(F.conv1d(F.pad(xBC.mT, (2, 0)), conv_weight, conv_bias, groups=channels)).mT
    x = xBC[..., :24].reshape(batch, length, 6, 4)
    B, C = (t.reshape(batch, length, 2, 5).repeat_interleave(3, 2) for t in xBC[..., 24:].split(10, -1))
    delta = F.softplus(dt + dt_bias)
    h, y = torch.zeros(batch, 6, 4, 5, dtype=x.dtype), []
    for t in range(length):
        h = (-delta[:, t] * A_log.exp())[..., None, None].exp() * h
        h = h + delta[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None]
        y.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(y, 1).flatten(2)


def gate_and_norm(y, z, weight):
    """Normalise each group of heads separately."""
    y = (y * F.silu(z)).unflatten(-1, (2, 12))
    return (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight


DIRECTION = ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias")


def test_mamba2_with_the_authors_names(relative_error):
    shapes = {
        "in_proj.weight": (24 + 24 + 2 * 2 * 5 + 6, 12),
        "conv1d.weight": (24 + 2 * 2 * 5, 1, 3),
        "conv1d.bias": (24 + 2 * 2 * 5,),
        "A_log": (6,),
        "D": (6,),
        "dt_bias": (6,),
        "norm.weight": (24,),
        "out_proj.weight": (12, 24),
    }
    official = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    mixer = Mamba2(**SIZES).double()
    mixer.load_state_dict(official)
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    z, xBC, dt = (x @ official["in_proj.weight"].T).split([24, 24 + 2 * 2 * 5, 6], -1)
    y = one_direction(xBC, dt, *(official[name] for name in DIRECTION))
    want = gate_and_norm(y, z, official["norm.weight"]) @ official["out_proj.weight"].T
    assert relative_error(mixer(x), want) < 1e-12
    for weights in (official, mixer.state_dict()):  # also within a model
        model = torch.nn.Sequential(Mamba2(**SIZES).double())
        model.load_state_dict({f"0.{name}": value for name, value in weights.items()})
        assert torch.equal(model(x), mixer(x))


def test_bimamba2(relative_error):
    mixer = shaken(BiMamba2(**SIZES))
    weights = mixer.state_dict()
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    z, xBC, dt = (x @ weights["in_proj.weight"].T).split([24, 24 + 2 * 2 * 5, 6], -1)
    forward = one_direction(xBC, dt, *(weights[f"forward_ssm.{name}"] for name in DIRECTION))
    backward = one_direction(xBC.flip(1), dt.flip(1), *(weights[f"backward_ssm.{name}"] for name in DIRECTION)).flip(1)
    want = gate_and_norm((forward + backward) / 2, z, weights["norm.weight"]) @ weights["out_proj.weight"].T
    assert relative_error(mixer(x), want) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_pieces_and_steps_equal_the_whole(d_conv, relative_error):
    mixer = shaken(Mamba2(**SIZES | {"d_conv": d_conv}))
    x = torch.randn(3, 23, 12, dtype=torch.float64)
    cache = Mamba2Cache(*(t.double() for t in mixer.allocate_cache(3)))
    outputs = [mixer(part, cache) for part in x[:, :12].split([9, 1, 2], 1)]
    outputs += [mixer.step(x[:, t], cache).unsqueeze(1) for t in range(12, 20)]
    outputs += [mixer(x[:, 20:], cache)]
    assert relative_error(torch.cat(outputs, 1), mixer(x)) < 1e-12


def test_initial_values():
    mixer = BiMamba2(640, head_dim=4)
    for ssm in (mixer.forward_ssm, mixer.backward_ssm):
        A, dt = ssm.A_log.exp(), F.softplus(ssm.dt_bias)
        assert 1 <= A.min() < 2
        assert 15 < A.max() <= 16.001
        assert abs(A.mean() - 8.5) < 1
        assert 0.000999 < dt.min() < 0.0015
        assert 0.07 < dt.max() < 0.1001
        assert torch.equal(ssm.D, torch.ones(320))
    assert torch.equal(mixer.norm.weight, torch.ones(1280))


@pytest.mark.parametrize("mixer_class", [Mamba2, BiMamba2])
def test_traced_and_without_data(mixer_class):
    mixer = mixer_class(**SIZES)
    x = torch.randn(2, 9, 12)
    assert torch.equal(torch.fx.symbolic_trace(torch.nn.Sequential(mixer))(x), mixer(x))
    assert functional_call(mixer.to("meta"), {}, x.to("meta")).shape == x.shape


class Calls(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is self.operator
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs a backend with an operator")
@pytest.mark.parametrize("mixer_class", [Mamba2, BiMamba2])
def test_checkpointing_keeps_the_duals(mixer_class):
    mixer, x = mixer_class(**SIZES), torch.randn(2, 9, 12, requires_grad=True)
    found = []
    for run in (mixer, functools.partial(recompute_all_but_scans, mixer)):
        with Calls(torch.ops.vim_kernels.ssd.default) as calls:
            y = run(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
        assert calls.count == (1 if mixer_class is Mamba2 else 2)
    for kept, plain in zip(*found, strict=True):
        assert torch.equal(kept, plain)


@pytest.mark.parametrize("mixer_class", [Mamba2, BiMamba2])
def test_sizes_that_do_not_divide(mixer_class):
    with pytest.raises(ValueError, match=r"head_dim must divide d_inner = expand \* d_model = 24, got 64"):
        mixer_class(12)
    with pytest.raises(ValueError, match="groups must divide the d_inner / head_dim = 6 heads, got 4"):
        mixer_class(12, head_dim=4, groups=4)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer_class", [Mamba2, BiMamba2])
def test_on_a_gpu_in_half_precision(mixer_class):
    """in_proj has 422 columns, no multiple of 8, and Mamba2's has a bias; `ssd` runs its kernels."""
    mixer = mixer_class(96, d_state=16, head_dim=32, **{"bias": True} if mixer_class is Mamba2 else {})
    x = torch.randn(2, 70, 96)
    results = []
    for device in ("cpu", "cuda"):
        mixer.to(device).zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = mixer(x.to(device).to(torch.bfloat16 if device == "cuda" else torch.float32))
        y.float().square().sum().backward()
        results.append([y.float().cpu()] + [p.grad.clone().cpu() for p in mixer.parameters()])
    for got, want in zip(*reversed(results), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()
