"""A block of Vision Mamba in one call, against the operators that it stands for, in fp64."""

import pytest
import torch
from block_inputs import block_inputs, by_operators, weights_to
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from vim_kernels import bimamba_block, bimamba_block_serves
from vim_kernels.backends import unavailable

pytestmark = pytest.mark.skipif(unavailable("cpu") is not None, reason="needs a C compiler")

# Sizes off those of vectors, blocks of rows and chunks of steps, and on them.
SHAPES = [
    {},
    {"batch": 1, "length": 1, "d_model": 1, "d_inner": 1, "d_state": 1, "rank": 1, "taps": 1},
    {"batch": 3, "length": 1, "d_model": 16, "d_inner": 32, "d_state": 16},
    {"length": 32, "d_model": 32, "d_inner": 64, "d_state": 16, "rank": 12},
    {"length": 129, "d_model": 7, "d_inner": 33, "d_state": 17, "rank": 3, "taps": 2},
    {"batch": 5, "length": 9, "d_inner": 70, "d_state": 2, "rank": 9, "conv_bias": False},
    {"length": 3, "taps": 7, "rank": 0},
]


def serves(x, weights) -> bool:
    with torch.no_grad():
        return bimamba_block_serves(x, weights)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_the_operators(shape, dtype, limit):
    x, weights = block_inputs(**shape)
    want = by_operators(x, weights, scale=0.7, eps=0.1)
    y = bimamba_block(x.to(dtype), weights_to(weights, dtype), scale=0.7, eps=0.1)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert (y - want).abs().max() < limit * want.abs().max()


def test_large_and_tiny_inputs():
    """Steps that forget all, steps of size zero, and a norm of almost nothing."""
    x, weights = block_inputs(length=40)
    x[0] *= 1e-6
    for ssm in (weights.forward, weights.reverse):
        ssm.dt_bias[::3] = 60
        ssm.dt_bias[1::3] = -60
    want = by_operators(x, weights)
    y = bimamba_block(x.float(), weights_to(weights, torch.float32))
    assert (y - want).abs().max() < 2e-6 * want.abs().max()


def test_strided_inputs_and_weights():
    x, weights = block_inputs(batch=3, length=20, d_model=6)
    want = bimamba_block(x, weights)
    assert_close(bimamba_block(x.transpose(0, 1).contiguous().transpose(0, 1), weights), want, rtol=0, atol=0)
    assert_close(bimamba_block(torch.cat((x, x), -1)[..., 6:], weights), want, rtol=0, atol=0)
    assert_close(bimamba_block(x.mT.contiguous().mT, weights), want, rtol=0, atol=0)
    turned = weights._replace(in_proj=weights.in_proj.mT.contiguous().mT)
    assert_close(bimamba_block(x, turned), want, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_groups_and_threads_do_not_change_a_bit(threads):
    """13 sequences are more than a group: each is as if it were alone."""
    shape = {"length": 900, "d_model": 40, "d_inner": 96, "d_state": 3}
    x, weights = block_inputs(batch=13, **shape, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([bimamba_block(row.unsqueeze(0), weights) for row in x])
        torch.set_num_threads(threads)
        whole = bimamba_block(x, weights)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, alone)


def test_the_second_direction_is_the_first_mirrored():
    x, weights = block_inputs()
    y = bimamba_block(x.flip(1), weights._replace(forward=weights.reverse, reverse=weights.forward)).flip(1)
    assert_close(y, bimamba_block(x, weights), rtol=1e-13, atol=1e-13)


def test_no_steps():
    x, weights = block_inputs()
    assert bimamba_block(x[:0], weights).shape == (0, 37, 12)
    assert bimamba_block(x[:, :0], weights).shape == (2, 0, 12)


def test_rules():
    x, weights = block_inputs()
    forward = weights.forward
    with pytest.raises(ValueError, match=r"x must be \(batch, length, d_model\)"):
        bimamba_block(x[0], weights)
    with pytest.raises(ValueError, match=r"weights.in_proj must be .* = \(48, 12\), got \(47, 12\)"):
        bimamba_block(x, weights._replace(in_proj=weights.in_proj[1:]))
    with pytest.raises(TypeError, match=r"weights.norm must have the dtype of x, torch.float64, got torch.float32"):
        bimamba_block(x, weights._replace(norm=weights.norm.float()))
    with pytest.raises(TypeError, match="x must have a dtype of"):
        bimamba_block(x.bfloat16(), weights)
    with pytest.raises(ValueError, match="x must be on a CPU, got meta"):
        bimamba_block(x.to("meta"), meta(weights))
    nothing = torch.zeros(0, 5, dtype=x.dtype)
    with pytest.raises(ValueError, match=r"weights.forward.A_log must have at least one channel and state"):
        bimamba_block(x, weights._replace(forward=forward._replace(A_log=nothing)))
    with pytest.raises(ValueError, match=r"weights.forward.conv must have at least one tap"):
        bimamba_block(x, weights._replace(forward=forward._replace(conv=torch.zeros(24, 1, 0, dtype=x.dtype))))
    for name in forward._fields:
        for side in ("forward", "reverse"):
            broken = getattr(weights, side)._replace(**{name: torch.zeros(3, dtype=x.dtype)})
            with pytest.raises(ValueError, match=rf"weights.{side}.{name} must (be of|have)"):
                bimamba_block(x, weights._replace(**{side: broken}))


def meta(weights):
    norm, in_proj, out_proj, *ssms = weights
    ssms = [type(ssm)._make(None if t is None else t.to("meta") for t in ssm) for ssm in ssms]
    return type(weights)(norm.to("meta"), in_proj.to("meta"), out_proj.to("meta"), *ssms)


class Own(torch.Tensor):
    pass


def test_serves_only_where_nothing_must_see_the_operators():
    x, weights = block_inputs(dtype=torch.float32)
    assert serves(x, weights)
    assert serves(x, weights._replace(norm=torch.nn.Parameter(weights.norm)))
    assert not bimamba_block_serves(x, weights), "gradients"
    assert not serves(x.as_subclass(Own), weights)
    assert not serves(x, weights._replace(norm=weights.norm.as_subclass(Own)))
    assert not serves(x.bfloat16(), weights_to(weights, torch.bfloat16))
    assert not serves(x, weights_to(weights, torch.float64))
    assert not serves(x.to("meta"), meta(weights))
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, weights)
    with FlopCounterMode(display=False):
        assert not serves(x, weights)
    with torch.autograd.forward_ad.dual_level():
        assert not serves(x, weights)
    seen = []
    torch.func.vmap(lambda row: (seen.append(serves(x, weights)), row)[1])(x)
    torch.jit.trace(lambda x: (seen.append(serves(x, weights)), x + 1)[1], x, check_trace=False)
    assert seen == [False, False]


def test_a_compiled_program_keeps_the_operators():
    x, weights = block_inputs(dtype=torch.float32)

    @torch.compile(backend="eager", fullgraph=True)
    def program(x):
        return x + 1 if bimamba_block_serves(x, weights) else x + 2

    with torch.no_grad():
        assert torch.equal(program(x), x + 2)
