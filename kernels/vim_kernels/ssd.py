"""State-space duality: the recurrence of Mamba-2, one decay a head, computed by matrix products over chunks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .checks import check, check_shape, check_tensors
from .precision import own_precision
from .reference import state_dtype


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
):
    """Run the state-space recurrence of heads whose states all decay alike.

        delta[t] = softplus(dt[t] + dt_bias)
        h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * x[t] B[t]^T
        y[t] = h[t] C[t] + D * x[t]

    It is `selective_scan` with A, dt, D and dt_bias the same for the channels of a head. Within a chunk of steps
    y = (decays * C B^T) x, as in linear attention; what came before a chunk reaches it through the state. The work and
    the memory grow linearly with the length.

    Args:
        x: (batch, length, heads, head_dim), any float dtype, may be strided; the products are in this dtype, the
            decays and the states in fp32, and all in fp64 if any tensor is fp64.
        dt: (batch, length, heads). A: (heads,), negative.
        B, C: (batch, length, groups, d_state), where group g serves the heads
            [g * heads / groups, (g + 1) * heads / groups).
        D, dt_bias: (heads,).
        dt_softplus: False takes dt + dt_bias as the step itself.
        chunk_size: most steps in a chunk. About sqrt(head_dim * d_state) keeps the decays of a chunk, chunk_size a
            step, no larger than its state. The Triton kernels know chunks of 16, 32 and 64.
        initial_state: (batch, heads, head_dim, d_state), the state in front of the first step processed.
        return_last_state: also return the state behind the last step processed (step 0 in reverse).
        reverse: run from the last step to the first.

    Returns: y like x, or (y, last_state) with last_state (batch, heads, head_dim, d_state) in fp32 (fp64). Length 0
        gives an empty y and the initial state.

    Raises: ValueError, TypeError: a wrong shape, device, dtype or chunk size.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 6. B is discretised by Euler's rule, as in the authors' code.
    """
    _check(x, dt, A, B, C, D, dt_bias, initial_state, chunk_size)
    inputs = x, dt, A, B, C, D, dt_bias, initial_state
    options: dict[str, Any] = {"dt_softplus": dt_softplus, "chunk_size": chunk_size, "reverse": reverse}
    if _has_kernels(x, B, dt, A, C, D, dt_bias, initial_state):
        from . import triton_ssd  # imports triton, which not every platform has

        y, last_state = triton_ssd.ssd(*inputs, **options)
    else:
        y, last_state = _by_torch(*inputs, **options)
    return (y, last_state) if return_last_state else y


def _has_kernels(x: Tensor, B: Tensor, *others: Tensor | None) -> bool:
    """Whether to take the Triton kernels: they multiply in half precision, and a compiler cannot look into them."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and state_dtype(B, *others) != torch.float64
        and x.shape[3] <= 128
        and 0 < B.shape[3] <= 256
        and x.numel() > 0
        and backends.takes_triton(x.device)
    )


def _by_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    dt_softplus: bool,
    chunk_size: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`ssd` by ATen operators, for every device and dtype: y and the last state."""
    wide = state_dtype(x, dt, A, B, C, D, dt_bias, initial_state)
    narrow = wide if wide == torch.float64 else x.dtype
    (batch, length, heads, head_dim), (groups, d_state) = x.shape, B.shape[2:]

    with own_precision(x.device.type):
        delta = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
        delta = F.softplus(delta) if dt_softplus else delta

        # In shapes: b batch, c chunks, q and k steps of a chunk, g groups, r heads of a group, p head_dim, n d_state.
        count, steps = _division(length, chunk_size)
        rows = (0, count * steps - length)

        def chunks(t: Tensor, *last: int) -> Tensor:
            """(B, L, ...) -> (b, c, q, *last). Steps behind the end have delta = 0: they change no state."""
            t = F.pad(t, (0, 0) * (t.ndim - 2) + rows) if rows[1] else t
            return t.reshape(batch, count, steps, *last)

        per_head = groups, heads // groups
        delta_c = chunks(delta, *per_head)
        x_c = chunks(x, *per_head, head_dim).to(wide) * delta_c.unsqueeze(-1)
        B_c, C_c = (chunks(t.to(narrow), groups, d_state) for t in (B, C))

        exponent = (delta_c * A.to(wide).reshape(per_head)).permute(0, 1, 3, 4, 2)  # (b, c, g, r, q)
        decays = _segment_decays(exponent, reverse)  # (b, c, g, r, q, k)
        to_end = decays[..., 0 if reverse else -1, :].permute(0, 1, 4, 2, 3)  # (b, c, q, g, r)

        scores = torch.einsum("bcqgn, bckgn -> bcgqk", C_c, B_c)
        weights = (scores.unsqueeze(3) * decays).to(narrow)
        y = torch.einsum("bcgrqk, bckgrp -> bcqgrp", weights, x_c.to(narrow)).to(wide)

        added = torch.einsum("bcqgrp, bcqgn -> bcgrpn", (x_c * to_end.unsqueeze(-1)).to(narrow), B_c)
        if initial_state is None:
            initial_state = x.new_zeros(batch, heads, head_dim, d_state)
        before, last_state = _carry(
            added.to(wide).reshape(batch, count, heads, head_dim * d_state),
            exponent.sum(-1).reshape(batch, count, heads),
            initial_state.to(wide).flatten(2),
            reverse,
        )
        before = before.reshape(batch, count, *per_head, head_dim, d_state).to(narrow)
        carried = torch.einsum("bcqgn, bcgrpn -> bcqgrp", C_c, before).to(wide)
        from_start = _sums(exponent, reverse).exp().permute(0, 1, 4, 2, 3)
        y = y + carried * from_start.unsqueeze(-1)

        y = y.reshape(batch, count * steps, heads, head_dim)[:, :length]
        if D is not None:
            y = y + D.to(wide).unsqueeze(-1) * x
    return y.to(x.dtype), last_state.unflatten(2, (head_dim, d_state))


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    check_tensors(tensors, like="x")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check(x.dim() == 4, "x", x, "be (batch, length, heads, head_dim)")
    batch, length, heads, head_dim = x.shape
    check_shape("dt", dt, "(batch, length, heads)", (batch, length, heads))
    check_shape("A", A, "(heads,)", (heads,))
    check(B.dim() == 4 and B.shape[:2] == x.shape[:2], "B", B, f"be ({batch}, {length}, groups, d_state)")
    groups, d_state = B.shape[2:]
    check(groups > 0 and heads % groups == 0, "B", B, f"have groups that divide heads = {heads}")
    check_shape("C", C, "the shape of B", tuple(B.shape))
    check_shape("D", D, "(heads,)", (heads,))
    check_shape("dt_bias", dt_bias, "(heads,)", (heads,))
    want = (batch, heads, head_dim, d_state)
    check_shape("initial_state", initial_state, "(batch, heads, head_dim, d_state)", want)


def _division(length: int, chunk_size: int) -> tuple[int, int]:
    """How many chunks, and their steps: as even as can be, so that little is padded."""
    most = -(-length // chunk_size)
    steps = max(1, -(-length // max(most, 1)))
    if most > 1:
        # Tensor cores read rows of 16 bytes: eight numbers in half precision.
        steps = min(chunk_size, -(-steps // 8) * 8)
    return -(-length // steps), steps


def _sums(exponent: Tensor, reverse: bool) -> Tensor:
    """Sums over the steps up to each, itself included, in the order of processing: (..., Q) -> (..., Q)."""
    # The flips are of numbers a head. The sequences themselves stay as they are: in reverse, decays are triangular the
    # other way round.
    return exponent.flip(-1).cumsum(-1).flip(-1) if reverse else exponent.cumsum(-1)


def _segment_decays(exponent: Tensor, reverse: bool) -> Tensor:
    """How much of what step k adds is left behind step q: exp of the sum of the exponents after k up to q.

    Args: exponent: (..., Q), not above 0.
    Returns: (..., Q, Q), 0 where k comes after q.
    """
    # Each segment is summed by itself. As a difference of two sums from the start, which may be large and nearly equal,
    # it would lose its digits, and its gradient too.
    steps = exponent.shape[-1]
    if reverse:  # the segment is from q up to what stands in front of k
        exponent = F.pad(exponent[..., :-1], (1, 0))
    sums = exponent.unsqueeze(-2).expand(*exponent.shape, steps).triu(1).cumsum(-1)  # from row to column
    behind = torch.ones(steps, steps, dtype=torch.bool, device=exponent.device).tril(-1)
    decays = sums.masked_fill_(behind, -torch.inf).exp_()
    return decays if reverse else decays.mT


def _carry(added: Tensor, exponent: Tensor, initial: Tensor, reverse: bool, most: int = 64) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks, state = exp(exponent) * state + added, itself in chunks of at most `most`, and so on.

    Args: added: (B, C, H, F). exponent: (B, C, H). initial: (B, H, F).
    Returns: the states in front of each chunk, (B, C, H, F), and behind the last one processed, (B, H, F).
    """
    batch, count = added.shape[:2]
    if count <= most:
        return _carry_within(added, exponent, initial, reverse)
    blocks = -(-count // most)
    rows = (0, blocks * most - count)
    added = F.pad(added, (0, 0, 0, 0, *rows)).reshape(batch * blocks, most, *added.shape[2:])
    exponent = F.pad(exponent, (0, 0, *rows)).reshape(batch * blocks, most, -1)
    _, alone = _carry_within(added, exponent, torch.zeros_like(added[:, 0]), reverse)
    into, last = _carry(
        alone.unflatten(0, (batch, blocks)), exponent.sum(1).unflatten(0, (batch, blocks)), initial, reverse, most
    )
    before, _ = _carry_within(added, exponent, into.flatten(0, 1), reverse)
    return before.reshape(batch, blocks * most, *before.shape[2:])[:, :count], last


def _carry_within(added: Tensor, exponent: Tensor, initial: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """`_carry` by one product with all decays from chunk to chunk; the initial state counts as a chunk's."""
    first, none = initial.unsqueeze(1), initial.new_zeros(initial[..., 0].shape).unsqueeze(1)
    states = torch.cat((added, first) if reverse else (first, added), 1)
    exponent = torch.cat((exponent, none) if reverse else (none, exponent), 1)
    decays = _segment_decays(exponent.transpose(1, 2), reverse)  # (B, H, 1 + C, 1 + C)
    states = torch.einsum("bhij, bjhf -> bihf", decays, states)
    return (states[:, 1:], states[:, 0]) if reverse else (states[:, :-1], states[:, -1])
