"""Backend `torch` of `ssd`: ATen operators only, in chunks of steps, with the state carried from chunk to chunk."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import own_precision, state_dtype


def ssd(
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
    """See `vim_kernels.ssd`: y and the last state, for every device and dtype."""
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
            """(B, L, ...) -> (b, c, q, *last). Padded steps have delta = 0, which changes no state."""
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


def _division(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and steps per chunk, chosen for little padding."""
    most = -(-length // chunk_size)
    steps = max(1, -(-length // max(most, 1)))
    if most > 1:
        # Tensor cores read rows of 16 bytes: eight values in half precision.
        steps = min(chunk_size, -(-steps // 8) * 8)
    return -(-length // steps), steps


def _sums(exponent: Tensor, reverse: bool) -> Tensor:
    """Cumulative sums over the steps in processing order: (..., Q) -> (..., Q)."""
    # Only values per head are flipped, not the sequences: in reverse, the decays are triangular the other way round.
    return exponent.flip(-1).cumsum(-1).flip(-1) if reverse else exponent.cumsum(-1)


def _segment_decays(exponent: Tensor, reverse: bool) -> Tensor:
    """The share of step k's input that remains after step q: exp of the sum of the exponents after k up to q.

    Args: exponent: (..., Q), at most 0.
    Returns: (..., Q, Q), 0 if k comes after q.
    """
    # Each segment is summed separately. The difference of two sums from the start, which may be large and nearly equal,
    # would lose digits, and so would its gradient.
    steps = exponent.shape[-1]
    if reverse:  # the segment runs from q to the step before k
        exponent = F.pad(exponent[..., :-1], (1, 0))
    behind = torch.ones(steps, steps, dtype=torch.bool, device=exponent.device).tril(-1)
    pairs = exponent.unsqueeze(-2).expand(*exponent.shape, steps)  # from row to column
    decays = pairs.triu(1).cumsum(-1).masked_fill(behind, -torch.inf).exp()
    return decays if reverse else decays.mT


def _carry(added: Tensor, exponent: Tensor, initial: Tensor, reverse: bool, most: int = 64) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks, state = exp(exponent) * state + added, recursively in blocks of `most` chunks.

    Args: added: (B, C, H, F). exponent: (B, C, H). initial: (B, H, F).
    Returns: the states before each chunk, (B, C, H, F), and after the last one processed, (B, H, F).
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
    """`_carry` as one product with the decays between all chunks; the initial state acts as a chunk."""
    first, none = initial.unsqueeze(1), initial.new_zeros(initial[..., 0].shape).unsqueeze(1)
    states = torch.cat((added, first) if reverse else (first, added), 1)
    exponent = torch.cat((exponent, none) if reverse else (none, exponent), 1)
    decays = _segment_decays(exponent.transpose(1, 2), reverse)  # (B, H, 1 + C, 1 + C)
    states = torch.einsum("bhij, bjhf -> bihf", decays, states)
    return (states[:, 1:], states[:, 0]) if reverse else (states[:, :-1], states[:, -1])
