"""The single step of the recurrence."""

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import scan_inputs

from vim_kernels import MambaBlockWeights, causal_conv1d, mamba_block_step, selective_scan, selective_state_update


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_golden_step(golden, relative_error, device):
    t = golden("ssm_state_update", device=device)
    names = ("D", "z", "dt_bias")
    y, state = selective_state_update(
        *(t[f"in.{name}"] for name in ("state", "x", "dt", "A", "B", "C")), **{name: t[f"in.{name}"] for name in names}
    )
    assert relative_error(y, t["out.y"]) < 1e-5
    assert relative_error(state, t["out.state"]) < 1e-5


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("absent", [(), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_step_by_step_equals_the_whole(groups, absent, softplus, relative_error):
    inputs = scan_inputs(length=9, groups=groups, absent=absent)
    options = {"dt_softplus": softplus}
    want, last = selective_scan(**inputs, **options, return_last_state=True, backend="reference")
    state = inputs.pop("initial_state")
    fixed = {name: t for name, t in inputs.items() if name in ("A", "D", "dt_bias")}
    ys = []
    for t in range(9):
        step = {name: x[:, t] for name, x in inputs.items() if name not in fixed}
        before = state.clone()
        y, new_state = selective_state_update(state, **step, **fixed, **options)
        assert torch.equal(state, before), "the state is not modified"
        state = new_state
        ys.append(y)
    assert relative_error(torch.stack(ys, 1), want) < 1e-13
    assert relative_error(state, last) < 1e-13


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_keeps_the_state_in_its_precision(kept):
    inputs = {name: t.detach() for name, t in scan_inputs(length=1, dtype=torch.bfloat16).items()}
    state = inputs.pop("initial_state").to(kept)
    step = {name: t[:, 0] if t.dim() == 3 else t for name, t in inputs.items()}
    y, new_state = selective_state_update(state, **step)
    assert (y.dtype, new_state.dtype) == (torch.bfloat16, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state": torch.zeros(2, 24, 15)},
            r"state must be \(batch, d_inner, d_state\) = \(2, 24, 16\), got \(2, 24, 15\)",
        ),
        ({"u": torch.zeros(2, 1, 24)}, r"u must be \(batch, d_inner\), got \(2, 1, 24\)"),
        ({"B": torch.zeros(2, 15)}, r"B must be \(batch\[, groups\], d_state\) = \(2, 16\), got \(2, 15\)"),
        ({"C": torch.zeros(2, 7, 16)}, "C must have groups that divide d_inner = 24 evenly"),
        ({"dt": torch.zeros(2, 1)}, r"dt must be the shape of u, .* = \(2, 24\), got \(2, 1\)"),
        ({"z": torch.zeros(2, 1)}, r"z must be the shape of u, .* = \(2, 24\), got \(2, 1\)"),
        ({"A": torch.zeros(1, 16)}, r"A must be \(d_inner, d_state\) with d_inner = 24, got \(1, 16\)"),
        ({"D": torch.zeros(1)}, r"D must be \(d_inner,\) = \(24,\), got \(1,\)"),
        ({"dt_bias": torch.zeros(1)}, r"dt_bias must be \(d_inner,\) = \(24,\), got \(1,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = scan_inputs(length=1, dtype=torch.float32)
    state = inputs.pop("initial_state")
    step = {"state": state} | {name: t[:, 0] if t.dim() == 3 else t for name, t in inputs.items()}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**step | change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("taps", [1, 4])
def test_block_steps_equal_the_whole(dtype, taps, relative_error):
    """The states are updated in place, in their precision, and nothing else changes."""
    batch, length, d_model, d_inner, d_state, rank, eps = 2, 6, 5, 6, 3, 2, 0.25
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = (d_model,), (2 * d_inner, d_model), (d_inner, taps), (d_inner,), (rank + 2 * d_state, d_inner)
    shapes += (d_inner, rank), (d_inner,), (d_inner, d_state), (d_inner,), (d_model, d_inner)
    weights = MambaBlockWeights(*(random(*shape) for shape in shapes))
    full = torch.promote_types(dtype, torch.float32)
    x, conv_state = random(batch, length, d_model).to(full), random(batch, taps - 1, d_inner)
    ssm_state = random(batch, d_inner, d_state).to(full)
    w, stream, window, state = MambaBlockWeights._make(t.double() for t in weights), x.double(), conv_state, ssm_state

    normed = stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt() * w.norm
    u, z = (normed @ w.in_proj.mT).chunk(2, -1)
    options = {"initial_state": window.double(), "return_final_state": True, "backend": "reference"}
    u, window = causal_conv1d(u, w.conv, w.conv_bias, activation="silu", **options)
    dt, B, C = (u @ w.x_proj.mT).split([rank, d_state, d_state], -1)
    options = {"initial_state": state.double(), "return_last_state": True, "backend": "reference"}
    y, state = selective_scan(u, dt @ w.dt_proj.mT, -w.A_log.exp(), B, C, D=w.D, z=z, dt_bias=w.dt_bias, **options)
    want = stream + y @ w.out_proj.mT

    before = [t.clone() for t in (x, *weights)]
    ys = [mamba_block_step(x[:, t], conv_state, ssm_state, weights, eps=eps) for t in range(length)]
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *weights), strict=True))
    limit = 1e-12 if dtype == torch.float64 else 0.05
    for got, right, kind in ((torch.stack(ys, 1), want, full), (conv_state, window, dtype), (ssm_state, state, full)):
        assert got.dtype == kind
        assert relative_error(got, right) < limit


def test_a_block_step_decays_its_state_in_fp32(relative_error):
    """With bf16 weights and no input, only exp(delta A) changes the state."""
    d_model, d_inner, d_state, rank = 4, 6, 3, 2
    generator = torch.Generator().manual_seed(0)
    A_log, dt_bias = (torch.randn(*s, generator=generator).bfloat16() for s in ((d_inner, d_state), (d_inner,)))
    shapes = (d_model,), (2 * d_inner, d_model), (d_inner, 1), (d_inner,), (rank + 2 * d_state, d_inner)
    first = [torch.zeros(shape, dtype=torch.bfloat16) for shape in (*shapes, (d_inner, rank))]
    last = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((d_inner,), (d_model, d_inner))]
    state = torch.randn(2, d_inner, d_state, generator=generator)
    want = state * torch.exp(F.softplus(dt_bias.double()).unsqueeze(-1) * -A_log.double().exp())
    mamba_block_step(
        torch.zeros(2, d_model),
        torch.zeros(2, 0, d_inner, dtype=torch.bfloat16),
        state,
        MambaBlockWeights._make([*first, dt_bias, A_log, *last]),
    )
    assert relative_error(state, want) < 1e-6


def test_a_block_step_says_what_is_wrong():
    d_model, d_inner, d_state, rank, taps = 4, 6, 3, 2, 4
    shapes = (
        (d_model,),
        (2 * d_inner, d_model),
        (d_inner, taps),
        (d_inner,),
        (rank + 2 * d_state, d_inner),
        (d_inner, rank),
        (d_inner,),
        (d_inner, d_state),
        (d_inner,),
        (d_model, d_inner),
    )
    weights = MambaBlockWeights(*(torch.zeros(shape) for shape in shapes))
    x, conv_state, ssm_state = torch.zeros(2, 4), torch.zeros(2, 3, 6), torch.zeros(2, 6, 3)
    learned = weights._replace(dt_bias=torch.zeros(d_inner, requires_grad=True))
    y = mamba_block_step(x, conv_state, ssm_state, learned)
    assert y.shape == (2, 4)
    assert not any(t.requires_grad for t in (y, conv_state, ssm_state))
    assert mamba_block_step(x[:0], conv_state[:0], ssm_state[:0], weights).shape == (0, 4)
    with pytest.raises(
        ValueError, match=r"conv_state must be \(batch, taps - 1, d_inner\) = \(2, 3, 6\), got \(2, 4, 6\)"
    ):
        mamba_block_step(x, torch.zeros(2, 4, 6), ssm_state, weights)
    with pytest.raises(
        ValueError, match=r"ssm_state must be \(batch, d_inner, d_state\) = \(2, 6, 3\), got \(1, 6, 3\)"
    ):
        mamba_block_step(x, conv_state, ssm_state[:1], weights)
    with pytest.raises(ValueError, match=r"weights.x_proj must be of the block's sizes = \(8, 6\), got \(7, 6\)"):
        mamba_block_step(x, conv_state, ssm_state, weights._replace(x_proj=torch.zeros(7, 6)))
    for name in ("norm", "conv_bias", "dt_bias", "D"):  # one number would broadcast to all channels
        with pytest.raises(ValueError, match=rf"weights.{name} must be of the block's sizes = .*, got \(1,\)"):
            mamba_block_step(x, conv_state, ssm_state, weights._replace(**{name: torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"x must be \(batch, d_model\), got \(4,\)"):
        mamba_block_step(x[0], conv_state, ssm_state, weights)
