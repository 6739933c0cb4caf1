"""The single step of the recurrence."""

import pytest
import torch
from scan_inputs import scan_inputs

from vim_kernels import MambaBlockWeights, mamba_block_step, selective_scan, selective_state_update


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
def test_step_by_step_equals_the_whole(groups, absent, relative_error):
    inputs = scan_inputs(length=9, groups=groups, absent=absent)
    want, last = selective_scan(**inputs, return_last_state=True, backend="reference")
    state = inputs.pop("initial_state")
    fixed = {name: t for name, t in inputs.items() if name in ("A", "D", "dt_bias")}
    ys = []
    for t in range(9):
        step = {name: x[:, t] for name, x in inputs.items() if name not in fixed}
        before = state.clone()
        y, new_state = selective_state_update(state, **step, **fixed)
        assert torch.equal(state, before), "the state is not modified"
        state = new_state
        ys.append(y)
    assert relative_error(torch.stack(ys, 1), want) < 1e-13
    assert relative_error(state, last) < 1e-13


def test_keeps_the_state_in_fp32():
    inputs = {name: t.detach() for name, t in scan_inputs(length=1, dtype=torch.bfloat16).items()}
    state = inputs.pop("initial_state")
    step = {name: t[:, 0] if t.dim() == 3 else t for name, t in inputs.items()}
    y, new_state = selective_state_update(state, **step)
    assert (y.dtype, new_state.dtype) == (torch.bfloat16, torch.float32)


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
        ({"D": torch.zeros(1)}, "D must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = scan_inputs(length=1, dtype=torch.float32)
    state = inputs.pop("initial_state")
    step = {"state": state} | {name: t[:, 0] if t.dim() == 3 else t for name, t in inputs.items()}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**step | change)


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
    assert mamba_block_step(x, conv_state, ssm_state, weights).shape == (2, 4)
    assert mamba_block_step(x[:0], conv_state[:0], ssm_state[:0], weights).shape == (0, 4)
    with pytest.raises(
        ValueError, match=r"conv_state must be \(batch, taps - 1, d_inner\) = \(2, 3, 6\), got \(2, 4, 6\)"
    ):
        mamba_block_step(x, torch.zeros(2, 4, 6), ssm_state, weights)
    with pytest.raises(ValueError, match=r"weights.x_proj must be of the block's sizes = \(8, 6\), got \(7, 6\)"):
        mamba_block_step(x, conv_state, ssm_state, weights._replace(x_proj=torch.zeros(7, 6)))
    with pytest.raises(ValueError, match=r"x must be \(batch, d_model\), got \(4,\)"):
        mamba_block_step(x[0], conv_state, ssm_state, weights)
