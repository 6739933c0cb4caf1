"""Mamba and BiMamba against golden numbers from the authors' code and properties of the recurrence."""

import math

import pytest
import torch
from torch.func import functional_call

from vim.layers import BiMamba, BiMamba2, Mamba, Mamba2, MambaBlock, MambaCache, RMSNorm
from vim.layers.rename import rename
from vim.layers.selective_ssm import pad_rank, project_by
from vim.models.official import NAMES
from vim_kernels import rms_norm


def official_mixer(tensors: dict) -> dict:
    """A state dict of the authors' bidirectional mixer under our names."""
    return {rename(NAMES, f"layers.0.mixer.{k}").removeprefix("blocks.0.mixer."): v for k, v in tensors.items()}


def test_bimamba_golden(golden, relative_error, mixer_backend):
    t = golden("g3_mixer_d32_L37", device=mixer_backend.device)
    mixer = BiMamba(32, device=mixer_backend.device)
    mixer.load_state_dict(official_mixer(golden("g3_mixer_d32_L37", "state_dict.")))
    x = t["input"].requires_grad_()
    y = mixer(x)
    assert (y - t["output_f64"]).abs().max() < 1e-5 * mixer_backend.limit
    (y * t["loss_weight"]).sum().backward()
    want = golden("g3_mixer_d32_L37", "grad_f64.")
    assert relative_error(x.grad, want.pop("input")) < 1e-4 * mixer_backend.limit
    want = official_mixer(want)
    gradients = {name: p.grad for name, p in mixer.named_parameters()}
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, want[name]) < 1e-4 * mixer_backend.limit, name


def golden_mamba(golden, device) -> Mamba:
    own = ("in_proj", "out_proj")
    weights = {k if k.startswith(own) else f"ssm.{k}": v for k, v in golden("ssm_mamba_block", "param.").items()}
    mixer = Mamba(32, device=device)
    mixer.load_state_dict(weights)
    return mixer


def test_mamba_golden(golden, relative_error, mixer_backend):
    t = golden("ssm_mamba_block", device=mixer_backend.device)
    mixer, limit = golden_mamba(golden, mixer_backend.device), mixer_backend.limit
    x = t["in.x"].requires_grad_()
    y = mixer(x)
    assert (y - t["out.y"]).abs().max() < 1e-5 * limit
    (y * t["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, t["grad.in.x"]) < 1e-4 * limit
    for name, p in mixer.named_parameters():
        assert relative_error(p.grad, t[f"grad.{name.removeprefix('ssm.')}"]) < 1e-4 * limit, name


@torch.no_grad()
def test_mamba_golden_decoding(golden, relative_error, mixer_backend):
    t = golden("ssm_mamba_block", device=mixer_backend.device)
    mixer, x, limit = golden_mamba(golden, mixer_backend.device), t["in.x"], 1e-5 * mixer_backend.limit
    length, prefill = x.shape[1], 10
    cache = mixer.allocate_cache(2)
    steps = torch.stack([mixer.step(x[:, i], cache) for i in range(length)], 1)
    assert relative_error(steps, t["out.step_y"]) < limit
    # The official cache also holds the current input of the convolution; ours only the inputs before the next.
    assert relative_error(cache.conv_state, t["state.conv_after_L"][..., 1:].transpose(1, 2)) < limit
    assert relative_error(cache.ssm_state, t["state.ssm_after_L"]) < limit

    cache = mixer.allocate_cache(2)
    head = mixer(x[:, :prefill], cache)
    assert relative_error(cache.conv_state, t["state.conv_after_prefill"][..., 1:].transpose(1, 2)) < limit
    assert relative_error(cache.ssm_state, t["state.ssm_after_prefill"]) < limit
    tail = [mixer.step(x[:, i], cache) for i in range(prefill, length)]
    assert relative_error(torch.cat([head, torch.stack(tail, 1)], 1), t["out.y"]) < limit


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_mamba_pieces_equal_the_whole(d_conv, relative_error):
    torch.manual_seed(0)
    mixer = Mamba(16, d_state=5, d_conv=d_conv, dt_rank=3).double()
    x = torch.randn(3, 23, 16, dtype=torch.float64)
    cache = MambaCache(*(t.double() for t in mixer.allocate_cache(3)))
    pieces = [mixer(part, cache) for part in x.split([9, 1, 2, 11], 1)]
    assert relative_error(torch.cat(pieces, 1), mixer(x)) < 1e-13


def test_bimamba_flip_symmetry(relative_error):
    """Exchanging the directions' parameters and flipping the sequence flips the output."""
    torch.manual_seed(0)
    mixer = BiMamba(16).double()
    swapped = {
        k.replace("forward_ssm", "x").replace("backward_ssm", "forward_ssm").replace("x.", "backward_ssm."): v
        for k, v in mixer.state_dict().items()
        if "_ssm" in k
    } | {k: v for k, v in mixer.state_dict().items() if "_ssm" not in k}
    assert swapped.keys() == mixer.state_dict().keys()
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    flipped = functional_call(mixer, swapped, x.flip(1))
    assert relative_error(flipped.flip(1), mixer(x)) < 1e-13


def test_initial_values():
    """dt_rank, step sizes within their range in BOTH directions, A = -(1..N), D = 1."""
    torch.manual_seed(0)
    mixer = BiMamba(40)
    for ssm in (mixer.forward_ssm, mixer.backward_ssm):
        assert ssm.dt_rank == math.ceil(40 / 16)
        dt = torch.nn.functional.softplus(ssm.dt_proj.bias)
        assert dt.min() >= 0.001 * 0.999
        assert dt.max() <= 0.1 * 1.001
        assert dt.log().std() > 1  # spread over the range, log-uniform has 1.33
        for bound in (ssm.dt_proj.weight.max(), -ssm.dt_proj.weight.min()):
            assert 0.95 < bound * ssm.dt_rank**0.5 <= 1
        assert torch.allclose(ssm.A_log.exp(), torch.arange(1.0, 17).expand(80, -1))
        assert torch.equal(ssm.D, torch.ones(80))


@pytest.mark.parametrize("mixer_class", [Mamba, BiMamba, Mamba2, BiMamba2])
def test_autocast_error_and_bf16_weights(mixer_class, relative_error):
    torch.manual_seed(0)
    mixer = mixer_class(32)
    x = torch.randn(2, 50, 32)
    want = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 2e-2
    got = mixer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 4e-2


def test_norm_hands_on_low_precision_under_autocast():
    """Under autocast the exact result is rounded once. Without autocast, and on meta, the norm equals torch's."""
    norm = RMSNorm(20, eps=1e-5)
    x = torch.randn(3, 5, 20)
    want = torch.nn.functional.rms_norm(x, (20,), norm.weight, 1e-5)
    assert torch.equal(norm(x), want)
    small = 1e-3 * x  # eps matters at this size
    assert torch.allclose(norm(small), torch.nn.functional.rms_norm(small, (20,), norm.weight, 1e-5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), want.bfloat16())
    assert norm.to("meta")(x.to("meta")).dtype == torch.float32
    with pytest.raises(ValueError, match=r"weight must be \(channels,\) = \(20,\), got \(19,\)"):
        rms_norm(x, torch.ones(19))


def test_a_padded_rank_gives_the_same_projections_and_gradients():
    torch.manual_seed(0)
    weights = [torch.randn(5 + 2 * 3, 7, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)]
    u = torch.randn(2, 4, 7, dtype=torch.float64)
    found = []
    for pad in (lambda x_proj, dt_proj: (x_proj, dt_proj), lambda x_proj, dt_proj: pad_rank(x_proj, dt_proj, 8)):
        leaves = [w.clone().requires_grad_() for w in weights]
        padded = pad(*leaves)
        dt, B, C = project_by(padded[0], padded[1], u)
        loss = (dt.sin() * B.sum(-1, keepdim=True) * C[..., :1]).sum()
        found.append([dt, B, C, *torch.autograd.grad(loss, leaves)])
    assert padded[0].shape == (8 + 2 * 3, 7)
    assert padded[1].shape == (7, 8)
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_block_keeps_its_residual_stream_wide(dtype, relative_error):
    """As one call and step by step; the error stays within that of a pure bf16 block."""
    torch.manual_seed(0)
    block = MambaBlock(24, 4, 3, 2).to(dtype)
    x = torch.randn(2, 9, 24)
    y, cache = block(x), block.mixer.allocate_cache(2)
    steps = torch.stack([block.step(one, cache) for one in x.unbind(1)], 1)
    assert y.dtype == steps.dtype == torch.float32
    assert relative_error(steps - x, y - x) < (0.03 if dtype == torch.bfloat16 else 1e-5)
    narrow = block(x.to(dtype))
    assert narrow.dtype == dtype


@pytest.mark.gpu
@torch.no_grad()
def test_a_million_steps(relative_error):
    """One call equals two halves joined by the state; in pieces, memory does not grow with the length."""
    torch.manual_seed(0)
    mixer = Mamba(192, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 1_000_000, 192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = mixer(x)
    whole = (torch.cuda.max_memory_allocated() - before) / 2**30
    cache = mixer.allocate_cache(1)
    halves = torch.cat([mixer(half, cache) for half in x.split(500_000, 1)], 1)
    last_place = 2**-8  # of the largest output
    assert relative_error(halves, y) < last_place
    torch.cuda.reset_peak_memory_stats()
    before, cache, pieces = torch.cuda.memory_allocated(), mixer.allocate_cache(1), torch.empty_like(x)
    for piece, out in zip(x.split(50_000, 1), pieces.split(50_000, 1), strict=True):
        out.copy_(mixer(piece, cache))
    in_pieces = (torch.cuda.max_memory_allocated() - before - pieces.nbytes) / 2**30
    assert relative_error(pieces, y) < last_place
    print(f"{whole:.2f} GiB for the whole, {in_pieces:.2f} GiB in pieces of 50,000 steps")
    assert in_pieces < whole / 10


def alone(mixer, x, lengths):
    """Run every packed sequence of every row separately."""
    rows = [torch.cat([mixer(part) for part in row.split(n, 1)], 1) for row, n in zip(x.split(1), lengths, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("mixer_class", [Mamba, BiMamba])
def test_packed_sequences_are_mixed_alone(mixer_class, mixer_backend, relative_error):
    torch.manual_seed(0)
    mixer = mixer_class(16, d_state=24).to(mixer_backend.device)  # few for a lane: the kernels compile fast
    lengths = [[1, 22, 2, 12], [37]]
    x = torch.randn(2, 37, 16, device=mixer_backend.device)
    seq_idx = torch.tensor([[i % 2 for i, n in enumerate(row) for _ in range(n)] for row in lengths], device=x.device)
    weight = torch.randn_like(x)
    found = []
    for y in (mixer(x, seq_idx=seq_idx), alone(mixer, x, lengths)):
        found.append([y, *torch.autograd.grad((y * weight).sum(), mixer.parameters())])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-5 * mixer_backend.limit


@torch.no_grad()
def test_a_cache_goes_on_with_the_last_sequence(relative_error):
    """The first sequence of a call continues the cache; the next call continues the last one."""
    torch.manual_seed(0)
    mixer = Mamba(16, d_state=5).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    seq_idx = torch.tensor([[0] * 11 + [1] * 15 + [2] * 4])
    cache = MambaCache(*(t.double() for t in mixer.allocate_cache(1)))
    pieces = [mixer(x[:, a:b], cache, seq_idx=seq_idx[:, a:b]) for a, b in ((0, 5), (5, 12), (12, 27))]
    pieces += [mixer.step(x[:, i], cache).unsqueeze(1) for i in (27, 28, 29)]
    assert relative_error(torch.cat(pieces, 1), alone(mixer, x, [[11, 15, 4]])) < 1e-13
