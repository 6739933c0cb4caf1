"""The recurrence of Mamba-2, as in mamba_ssm.ops.triton.ssd_combined."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check, check_shape, check_tensors
from ..packing import check_seq_idx, segments_of
from ..precision import state_dtype
from ..ssd import ssd

CLEARED = 120.0  # exp(-120) is 0 in fp32, and far below rounding in fp64


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
):
    """`vim_kernels.ssd` with packed sequences, limits of the step size, and a gate after it.

    Args:
        x, z: (batch, length, heads, head_dim). dt: (batch, length, heads). A, dt_bias: (heads,).
        B, C: (batch, length, groups, d_state). D: (heads,) or (heads, head_dim).
        chunk_size: at most 64 steps are taken at a time. The result does not depend on it.
        z: the output is multiplied by silu(z).
        initial_states: (batch, heads, head_dim, d_state). With seq_idx they belong to sequence 0: a row that begins
            with another one starts from zero, as in the original.
        seq_idx: (batch, length), int32 or int64, the sequence of each step if a row packs several; A must not be 0.
            Only changes count: a value that comes again later is another sequence. Finding the longest row
            synchronises with the device.
        cu_seqlens: only for return_varlen_states, and so without effect.
        dt_limit: the step size, after bias and softplus, is clamped to it. Negative steps become 0 in any case.
        return_final_states: also return the states after the last step, (batch, heads, head_dim, d_state), in fp32.
        return_varlen_states: True is refused.

    Returns: y like x, or (y, final_states).

    Raises: ValueError, TypeError: a wrong shape, device or dtype. NotImplementedError: return_varlen_states=True.
    """
    if return_varlen_states:
        raise NotImplementedError(
            "return_varlen_states=True is not supported, only False; for the states of packed sequences, call once per "
            "sequence with return_final_states=True"
        )
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_tensors({**named, "initial_states": initial_states}, like="x")
    check(x.dim() == 4, "x", x, "be (batch, length, heads, head_dim)")
    batch, length, heads, head_dim = x.shape
    check_shape("dt", dt, "(batch, length, heads)", (batch, length, heads))
    check_shape("A", A, "(heads,)", (heads,))
    check_shape("dt_bias", dt_bias, "(heads,)", (heads,))
    check_shape("z", z, "the shape of x", (batch, length, heads, head_dim))
    if D is not None and D.dim() == 2:
        check_shape("D", D, "(heads, head_dim)", (heads, head_dim))
    check_seq_idx(seq_idx, "x", x)
    wide = state_dtype(*named.values(), initial_states)

    delta = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(*dt_limit)
    steps, place = (x, delta, B, C), None
    if seq_idx is not None and length > 0:
        check(B.dim() == 4 and B.shape[:2] == x.shape[:2], "B", B, f"be ({batch}, {length}, groups, d_state)")
        check_shape("C", C, "the shape of B", tuple(B.shape))
        steps, place = _separated(seq_idx, A, *steps)
        if initial_states is not None:
            initial_states = initial_states * (seq_idx[:, 0] == 0).view(-1, 1, 1, 1)
    x_s, delta_s, B_s, C_s = steps
    per_head = D if D is not None and D.dim() == 1 else None
    y, final_states = ssd(
        x_s,
        delta_s,
        A,
        B_s,
        C_s,
        D=per_head,
        dt_softplus=False,
        chunk_size=min(chunk_size, 64),
        initial_state=initial_states,
        return_last_state=True,
    )
    if place is not None:
        y = y[place]
    if D is not None and per_head is None:
        y = y.to(wide) + D.to(wide) * x.to(wide)
    if z is not None:
        y = y.to(wide) * F.silu(z.to(wide))
    y = y.to(x.dtype)
    return (y, final_states) if return_final_states else y


def _separated(
    seq_idx: Tensor, A: Tensor, x: Tensor, delta: Tensor, B: Tensor, C: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Put a step between packed sequences that clears the state: it adds nothing, and its decay is 0.

    Returns: x, delta, B and C, (batch, length + most, ...), where `most` is the largest number of such steps in a row;
        and the index of the given steps in them. The rows end with steps of size 0, which change nothing.
    """
    segments = segments_of(seq_idx)
    assert segments is not None  # the length is not 0
    batch, length = seq_idx.shape
    longest = length + int(segments.max())
    row = torch.arange(batch, device=x.device).unsqueeze(1)
    place = row, torch.arange(length, device=x.device) + segments
    x, delta, B, C = (t.new_zeros(batch, longest, *t.shape[2:]).index_put(place, t) for t in (x, delta, B, C))
    cleared, step = (segments[:, 1:] != segments[:, :-1]).nonzero(as_tuple=True)
    delta = delta.index_put((cleared, place[1][cleared, step] + 1), (-CLEARED / A.detach()).to(delta.dtype))
    return (x, delta, B, C), place
