"""Mamba and Mamba2 with and without biases, under the authors' names, against their equations written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vim.layers import LayerNorm, Mamba, Mamba2, Mamba2Cache, MambaBlock, MambaCache

D, INNER, N, RANK, TAPS, HEADS = 12, 24, 5, 3, 3, 6
MIXED = INNER + 2 * 2 * N  # channels of Mamba2's convolution: x, and B and C of two groups
SHAPES = {
    Mamba: {
        "in_proj": (2 * INNER, D),
        "conv1d": (INNER, 1, TAPS),
        "x_proj": (RANK + 2 * N, INNER),
        "dt_proj": (INNER, RANK),
        "out_proj": (D, INNER),
        "A_log": (INNER, N),
        "D": (INNER,),
    },
    Mamba2: {
        "in_proj": (INNER + MIXED + HEADS, D),
        "conv1d": (MIXED, 1, TAPS),
        "norm": (INNER,),
        "out_proj": (D, INNER),
        "A_log": (HEADS,),
        "D": (HEADS,),
        "dt_bias": (HEADS,),
    },
}
LAYERS = {
    Mamba: lambda **kw: Mamba(D, N, TAPS, dt_rank=RANK, **kw).double(),
    Mamba2: lambda **kw: Mamba2(D, N, TAPS, head_dim=4, groups=2, **kw).double(),
}
CACHES = {Mamba: MambaCache, Mamba2: Mamba2Cache}
OPTIONS = [{"bias": bias, "conv_bias": conv_bias} for bias, conv_bias in itertools.product((False, True), repeat=2)]
every_layer = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def official(kind, *, bias, conv_bias):
    """A random state dict with the authors' names, in fp64."""
    biases = {"in_proj": bias, "out_proj": bias, "conv1d": conv_bias, "dt_proj": True}
    weights = {}
    for name, shape in SHAPES[kind].items():
        parameter = name in ("A_log", "D", "dt_bias")
        weights[name if parameter else f"{name}.weight"] = torch.randn(shape, dtype=torch.float64)
        if biases.get(name):
            weights[f"{name}.bias"] = torch.randn(shape[0], dtype=torch.float64)
    return weights


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def convolved(x, w):
    windows = F.pad(x, (0, 0, TAPS - 1, 0)).unfold(1, TAPS, 1)
    return F.silu((windows * w["conv1d.weight"][:, 0]).sum(-1) + w.get("conv1d.bias", 0))


def scanned(u, delta, A, B, C):
    """u, delta: (batch, length, inner). A: (inner, N). B, C: (batch, length, inner or 1, N)."""
    h, ys = torch.zeros(*u[:, 0].shape, N, dtype=u.dtype), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = (step * A).exp() * h + step * B[:, t] * u[:, t, :, None]
        ys.append((h * C[:, t]).sum(-1))
    return torch.stack(ys, 1)


def by_hand(kind, w, x):
    if kind is Mamba:
        u, z = linear(x, w, "in_proj").chunk(2, -1)
        u = convolved(u, w)
        dt, B, C = linear(u, w, "x_proj").split([RANK, N, N], -1)
        delta = F.softplus(linear(dt, w, "dt_proj"))
        y = scanned(u, delta, -w["A_log"].exp(), B[:, :, None], C[:, :, None]) + w["D"] * u
        return linear(y * F.silu(z), w, "out_proj")
    z, u, dt = linear(x, w, "in_proj").split([INNER, MIXED, HEADS], -1)
    u, B, C = convolved(u, w).split([INNER, 2 * N, 2 * N], -1)
    B, C = (t.unflatten(-1, (2, N)).repeat_interleave(INNER // 2, 2) for t in (B, C))
    A_log, skip, delta = (t.repeat_interleave(4, -1) for t in (w["A_log"], w["D"], F.softplus(dt + w["dt_bias"])))
    y = (scanned(u, delta, -A_log.exp()[:, None], B, C) + skip * u) * F.silu(z)
    y = y.unflatten(-1, (2, INNER // 2))
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w["norm.weight"]
    return linear(y, w, "out_proj")


def native(kind, name):
    own = ("in_proj", "out_proj", "norm")
    return name if name.startswith(own) else f"ssm.{name}"


@every_layer
@every_option
def test_output_and_gradients(kind, options, relative_error):
    weights = official(kind, **options)
    mixer = LAYERS[kind](**options)
    mixer.load_state_dict(weights)
    x, cotangent = torch.randn(2, 2, 11, D, dtype=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    y, want = mixer(x), by_hand(kind, leaves, x)
    assert relative_error(y, want) < 1e-12
    parameters = dict(mixer.named_parameters())
    assert parameters.keys() == {native(kind, name) for name in weights}
    got = torch.autograd.grad((y * cotangent).sum(), [parameters[native(kind, name)] for name in leaves])
    for one, other in zip(got, torch.autograd.grad((want * cotangent).sum(), list(leaves.values())), strict=True):
        assert relative_error(one, other) < 1e-11


@torch.no_grad()
@every_layer
@every_option
def test_pieces_and_steps(kind, options, relative_error):
    mixer, weights = LAYERS[kind](**options), official(kind, **options)
    mixer.load_state_dict(weights)
    x = torch.randn(3, 14, D, dtype=torch.float64)
    cache = CACHES[kind](*(part.double() for part in mixer.allocate_cache(3)))
    outputs = [mixer(part, cache) for part in x[:, :8].split([5, 1, 2], 1)]
    outputs += [mixer.step(one, cache).unsqueeze(1) for one in x[:, 8:12].unbind(1)]
    outputs += [mixer(x[:, 12:], cache)]
    assert relative_error(torch.cat(outputs, 1), by_hand(kind, weights, x)) < 1e-12


@torch.no_grad()
@every_option
def test_padding_and_packed_sequences(options, relative_error):
    """Padding is behind in_proj's bias and the convolution's, and must not reach the steps or the cache."""
    mixer, weights = LAYERS[Mamba](**options), official(Mamba, **options)
    mixer.load_state_dict(weights)
    x = torch.randn(1, 9, D, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False, True, True, False, True, True]])
    cache = MambaCache(*(part.double() for part in mixer.allocate_cache(1)))
    y = mixer(x, cache, mask)
    more = torch.randn(1, D, dtype=torch.float64)
    last = mixer.step(more, cache)
    want = by_hand(Mamba, weights, torch.cat((x[mask], more))[None])
    assert relative_error(torch.cat((y[mask], last))[None], want) < 1e-12
    packed = mixer(x, seq_idx=torch.tensor([[0] * 4 + [1] * 5]))
    want = torch.cat([by_hand(Mamba, weights, part) for part in x.split([4, 5], 1)], 1)
    assert relative_error(packed, want) < 1e-12


@every_layer
@every_option
def test_state_dicts_within_a_model(kind, options):
    """The authors' and our own load; one of a layer with other biases does not."""
    model = nn.Sequential(LAYERS[kind](**options))
    weights = official(kind, **options)
    model.load_state_dict({f"0.{name}": value for name, value in weights.items()})
    again = nn.Sequential(LAYERS[kind](**options))
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, D, dtype=torch.float64)
    assert torch.equal(again(x), model(x))
    for option, names in (("bias", "in_proj.bias.*out_proj.bias"), ("conv_bias", "ssm.conv1d.bias")):
        other = nn.Sequential(LAYERS[kind](**options | {option: not options[option]}))
        with pytest.raises(RuntimeError, match=f"(?s)(Unexpected|Missing) key.*0.{names}"):
            other.load_state_dict(model.state_dict())


@every_layer
def test_by_default_only_the_convolution_has_a_bias(kind):
    assert official(kind, bias=False, conv_bias=True).keys() == {
        name.removeprefix("ssm.") for name in LAYERS[kind]().state_dict()
    }


@every_layer
@every_option
def test_traced(kind, options):
    mixer = LAYERS[kind](**options)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(nn.Sequential(mixer))
    assert torch.equal(traced(x), mixer(x))


@torch.no_grad()
@pytest.mark.parametrize("rms_norm", [True, False])
@every_option
def test_steps_of_a_block(options, rms_norm, relative_error):
    """Of all blocks only one with an RMS norm and the usual biases has a fused step."""
    block = MambaBlock(D, N, TAPS, 2, RANK, rms_norm=rms_norm, norm_eps=0.1, **options).double()
    for p in block.parameters():
        p += 0.3 * torch.randn_like(p)
    x = torch.randn(2, 6, D, dtype=torch.float64)
    w = {name.removeprefix("mixer.").removeprefix("ssm."): p for name, p in block.state_dict().items()}
    centred = x if rms_norm else x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * w["norm.weight"] + w.get("norm.bias", 0)
    want = x + by_hand(Mamba, w, normed)
    assert ("norm.bias" in w) != rms_norm
    cache = MambaCache(*(part.double() for part in block.mixer.allocate_cache(2)))
    assert relative_error(block(x), want) < 1e-12
    assert relative_error(torch.stack([block.step(one, cache) for one in x.unbind(1)], 1), want) < 1e-12


def test_a_layer_norm_hands_on_the_dtype_of_the_layers_behind_it():
    """From a residual stream in fp32 it is computed in fp32 and rounded once, to the weights' dtype or autocast's."""
    norm = LayerNorm(20, eps=1e-5)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(20).bfloat16())
    x = 3 + torch.randn(3, 5, 20)
    want = F.layer_norm(x, (20,), norm.weight, norm.bias, 1e-5)
    assert torch.equal(norm(x), want)
    assert norm(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), want.bfloat16())
    assert torch.equal(norm.bfloat16()(x), want.bfloat16())
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm.to("meta")(x.to("meta")).dtype == torch.bfloat16
