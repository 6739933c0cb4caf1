# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Shared by the Triton scan kernels: the layout of states over the lanes of a warp, and the functions of one step.

A warp owns a block of REPEAT * LANES channels of one batch entry and one direction; a program has one warp per
direction. SPREAD * LANES = 32. Every value is a tile [32, directions]. Lane t = l * SPREAD + p holds

    in the recurrence: channel l * REPEAT + r, state p * TILES + i; the tuples of tiles run over r and i;
    of values per channel and step (u, dt, delta, y, z, their gradients): channel l * REPEAT + r at step p;
    of B and C: states p * TILES + i at step l.

So each value is loaded and computed once, and the recurrence fetches it from its lane by one shuffle (`from_lane`).
Sums over states or channels go the other way (`fold`), in a tree that halves the values of a lane at every level:
SPREAD sums over SPREAD lanes take SPREAD - 1 shuffles, and lane p ends with the sum of step p.

Both dimensions are one, so Triton has no layout to choose and inserts no conversions through shared memory. It derives
layouts from contiguity in memory, and here it can see none along the lanes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..directions import Direction
from ..rows import row_strides
from .activations import softplus

# Steps between the states that the forward saves. At 64 they take an eighth of the memory of xz (a Vim-Ti block).
INTERVAL = 64


def checkpoint_rows(length: int, directions: int) -> int:
    """States saved per direction. If two directions meet in the middle, the count restarts there."""
    return directions * triton.cdiv(triton.cdiv(length, directions), INTERVAL)


@triton.jit
def along(pair, dirs):
    """The item of each direction."""
    if len(pair) == 1:
        one = pair[0]
    else:
        one = tl.where(dirs == 0, pair[0], pair[1])
    return one


@triton.jit
def heading(dirs, length, REVERSE: tl.constexpr):
    """(first row, sign of a step) of each direction. The second of two runs in reverse."""
    if len(REVERSE) == 2:
        first = dirs * (length - 1)
        sign = 1 - 2 * dirs
    elif REVERSE[0]:
        first = dirs + (length - 1)
        sign = dirs - 1
    else:
        first = dirs
        sign = dirs + 1
    return first, sign


@triton.jit
def scaled(tiles, factor):
    product = ()
    for i in tl.static_range(len(tiles)):
        product = product + (tiles[i] * factor,)
    return product


@triton.jit
def both(masks, condition):
    met = ()
    for r in tl.static_range(len(masks)):
        met = met + (masks[r] & condition,)
    return met


@triton.jit
def load_channels(c, channel, group_size, dt_bias, D, dirs, REPEAT: tl.constexpr, S: tl.constexpr):
    """(mask, bias of dt or zero, D) of each of a lane's channels; without D, no D tiles."""
    inside = ()
    bias = ()
    skip = ()
    for r in tl.static_range(REPEAT):
        inside = inside + (c + r < group_size,)
        if dt_bias is not None:
            bias = bias + (tl.load(along(dt_bias, dirs) + channel + r, inside[r], 0.0).to(S),)
        else:
            bias = bias + (tl.zeros([1, 1], S),)
        if D is not None:
            skip = skip + (tl.load(along(D, dirs) + channel + r, inside[r], 0.0).to(S),)
    return inside, bias, skip


@triton.jit
def load_words(ptr, masks, PACK: tl.constexpr):
    """Load neighbouring values, PACK 16-bit values per word, for `unpack` to split.

    masks: one per value, equal within a word.
    """
    words = ()
    if PACK == 1:
        for i in tl.static_range(len(masks)):
            words = words + (tl.load(ptr + i, masks[i], 0.0),)
    else:
        wide = ptr.to(tl.pointer_type(tl.int64 if PACK == 4 else tl.int32), bitcast=True)
        for i in tl.static_range(len(masks) // PACK):
            words = words + (tl.load(wide + i, masks[i * PACK], 0),)
    return words


@triton.jit
def unpack(words, i: tl.constexpr, PACK: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr):
    """Value i of the words from `load_words`."""
    if PACK == 1:
        value = words[i].to(S)
    else:
        word = words[i // PACK]
        if PACK == 4:
            word = (word >> (32 * (i % PACK // 2))).to(tl.int32)
        if tl.bfloat16 == DTYPE and tl.float32 == S:
            value = ((word << 16) if i % 2 == 0 else (word & -65536)).to(tl.float32, bitcast=True)
        else:
            value = (word >> (16 * (i % 2))).to(tl.int16).to(DTYPE, bitcast=True).to(S)
    return value


@triton.jit
def unpack_all(rows, COUNT: tl.constexpr, PACK: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr):
    """COUNT values of each of the `rows`, as one tuple."""
    values = ()
    for j in tl.static_range(len(rows)):
        for i in tl.static_range(COUNT):
            values = values + (unpack(rows[j], i, PACK, DTYPE, S),)
    return values


@triton.jit
def store_words(ptr, values, masks, PACK: tl.constexpr):
    """Store values of a lane's channels to neighbouring elements, PACK 16-bit values per store; see `load_words`."""
    if PACK == 1:
        for i in tl.static_range(len(values)):
            tl.store(ptr + i, values[i], masks[i])
    else:
        wide = ptr.to(tl.pointer_type(tl.int64 if PACK == 4 else tl.int32), bitcast=True)
        for i in tl.static_range(len(values) // PACK):
            word = _bits(values[i * PACK : (i + 1) * PACK], ptr.dtype.element_ty)
            tl.store(wide + i, word, masks[i * PACK])


@triton.jit
def _bits(values, DTYPE: tl.constexpr):
    """Two or four values of 16 bits as one integer."""
    low = values[0].to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    word = (values[1].to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    if len(values) == 4:
        word = (_bits(values[2:], DTYPE).to(tl.int64) << 32) | (word.to(tl.int64) & 4294967295)
    return word


@triton.jit
def load_states(ptr, stride, mask, N: tl.constexpr, REPEAT: tl.constexpr, SPREAD: tl.constexpr, S: tl.constexpr):
    """State i of channel r is tile r * TILES + i. `ptr`: state 0 of channel 0; `stride`: from channel to channel."""
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    n = tl.arange(0, ptr.shape[0])[:, None] % SPREAD * TILES
    tiles = ()
    for r in tl.static_range(REPEAT):
        for i in tl.static_range(TILES):
            inside = mask[r] & (n + i < N)
            tiles = tiles + (tl.load(ptr + r * stride + n + i, inside, 0.0).to(S),)
    return tiles


@triton.jit
def store_states(ptr, stride, tiles, mask, N: tl.constexpr, REPEAT: tl.constexpr, SPREAD: tl.constexpr):
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    n = tl.arange(0, ptr.shape[0])[:, None] % SPREAD * TILES
    for r in tl.static_range(REPEAT):
        for i in tl.static_range(TILES):
            tl.store(ptr + r * stride + n + i, tiles[r * TILES + i], mask[r] & (n + i < N))


@triton.jit
def load_steps(
    ptr, row_step, step, end, p, mask, T: tl.constexpr, REPEAT: tl.constexpr, SPREAD: tl.constexpr, PACK: tl.constexpr
):
    """Words of T steps from `step` on, in tiles of min(SPREAD, T) steps. `ptr` points at the lane's step."""
    EACH: tl.constexpr = SPREAD if SPREAD < T else T
    tiles = ()
    for j in tl.static_range(T // EACH):
        at = j * EACH + p
        valid = (p < EACH) & (step + at < end)
        tiles = tiles + (load_words(ptr + j * EACH * row_step, both(mask, valid), PACK),)
    return tiles


@triton.jit
def load_rows(
    ptr, row_step, step, end, lane, p,
    N: tl.constexpr, T: tl.constexpr, SPREAD: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Words of B or C of T steps from `step` on, LANES steps per tile. `ptr` points at the lane's step and states."""
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    tiles = ()
    for j in tl.static_range((T + LANES - 1) // LANES):
        at = j * LANES + lane
        valid = (at < T) & (step + at < end)
        masks = ()
        for i in tl.static_range(TILES):
            masks = masks + ((valid & (p * TILES + i < N)) if N % SPREAD else valid,)
        tiles = tiles + (load_words(ptr + j * LANES * row_step, masks, PACK),)
    return tiles


@triton.jit
def load_begins(ptr, sign, step, end, p, T: tl.constexpr, SPREAD: tl.constexpr):
    """Whether each of T steps from `step` on begins a sequence; tiles and `ptr` as in `load_steps`."""
    EACH: tl.constexpr = SPREAD if SPREAD < T else T
    tiles = ()
    for j in tl.static_range(T // EACH):
        at = j * EACH + p
        tiles = tiles + (tl.load(ptr + j * EACH * sign, (p < EACH) & (step + at < end), 0).to(tl.int32),)
    return tiles


@triton.jit
def unless(begins, tiles):
    """The tiles, set to zero where a sequence begins."""
    kept = ()
    for i in tl.static_range(len(tiles)):
        kept = kept + (tl.where(begins != 0, 0.0, tiles[i]),)
    return kept


@triton.jit
def step_sizes(
    us, dts, bias, step, end, p,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, REPEAT: tl.constexpr, SPREAD: tl.constexpr,
    U_PACK: tl.constexpr, DT_PACK: tl.constexpr, U: tl.constexpr, DT: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """(u, delta) of each tile of steps and channel. From `end` on delta = 0, an identity step."""
    EACH: tl.constexpr = SPREAD if SPREAD < T else T
    values = ()
    deltas = ()
    for j in tl.static_range(T // EACH):
        valid = step + j * EACH + p < end
        for r in tl.static_range(REPEAT):
            delta = unpack(dts[j], r, DT_PACK, DT, S) + bias[r]
            if SOFTPLUS:
                delta = softplus(delta)
            deltas = deltas + (tl.where(valid, delta, 0.0),)
            values = values + (unpack(us[j], r, U_PACK, U, S),)
    return values, deltas


@triton.jit
def from_lane(tile, lane):
    """The value in lane `lane`; each lane names its own source."""
    return tl.gather(tile, tl.broadcast_to(lane, tile.shape), 0)


@triton.jit
def row_from_lane(rows, k: tl.constexpr, p, TILES: tl.constexpr, SPREAD: tl.constexpr, LANES: tl.constexpr):
    """The lane's states of B or C at step k of the block, from the tiles of `load_rows`."""
    states = ()
    for i in tl.static_range(TILES):
        states = states + (from_lane(rows[k // LANES * TILES + i], k % LANES * SPREAD + p),)
    return states


@triton.jit
def advance(
    h, k: tl.constexpr, us, deltas, A_tiles, B_k, C_k, t, p,
    REPEAT: tl.constexpr, TILES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Step k of a block: h = exp(delta A) h + delta u B, with A_tiles = log2(e) A.

    Returns: the states, and the sum of C h over the lane's states of each channel; no sums if C_k is None.
    """
    states = ()
    sums = ()
    for r in tl.static_range(REPEAT):
        delta = deltas[k // EACH * REPEAT + r]
        delta_k = from_lane(delta, t - p + k % EACH)
        x_k = from_lane(delta * us[k // EACH * REPEAT + r], t - p + k % EACH)
        for i in tl.static_range(TILES):
            h_i = tl.exp2(delta_k * A_tiles[r * TILES + i]) * h[r * TILES + i] + x_k * B_k[i]
            states = states + (h_i,)
            if C_k is not None:
                if i == 0:
                    y_k = h_i * C_k[i]
                else:
                    y_k += h_i * C_k[i]
        if C_k is not None:
            sums = sums + (y_k,)
    return states, sums


@triton.jit
def fold(values, t, W: tl.constexpr, LEAST: tl.constexpr):
    """Sums over the lanes t that differ only in the bits LEAST, 2 LEAST, ... W / 2; all numbers are powers of two.

    Returns a tuple. With l = t // LEAST % (W / LEAST), K values and M = K LEAST / W: if M >= 1, result j of M is the
    sum of values[l M + j]; otherwise the one result is the sum of values[l % K].
    """
    if W == LEAST:
        out = values
    else:
        half = ()
        if len(values) < W // LEAST:
            for q in tl.static_range(len(values)):
                half = half + (values[q] + from_lane(values[q], t ^ (W // 2)),)
        else:
            upper = (t & (W // 2)) != 0
            for q in tl.static_range(len(values) // 2):
                keep = tl.where(upper, values[q + len(values) // 2], values[q])
                send = tl.where(upper, values[q], values[q + len(values) // 2])
                half = half + (keep + from_lane(send, t ^ (W // 2)),)
        out = fold(half, t, W // 2, LEAST)
    return out


class Tile(NamedTuple):
    """Channels per lane, lanes that share the states of a channel, and steps per block of the main loop."""

    REPEAT: int
    SPREAD: int
    T: int

    @property
    def lanes(self) -> int:
        return 32 // self.SPREAD

    @property
    def channels(self) -> int:
        return self.REPEAT * self.lanes

    def blocks(self, d: Direction) -> int:
        """Blocks of channels in a group, whose channels share B and C."""
        return triton.cdiv(d.u.shape[2] // d.B.shape[2], self.channels)

    def programs(self, d: Direction) -> int:
        return self.blocks(d) * d.B.shape[2] * d.u.shape[0]

    def pack(self, d: Direction, *tensors: Tensor) -> int:
        """How many of a lane's channels, all in one group, a load or store of these sequences takes."""
        return pack(math.gcd(self.REPEAT, d.u.shape[2] // d.B.shape[2]), *tensors)

    def constants(self, directions: Sequence[Direction]) -> dict[str, object]:
        """Compile-time arguments of the scan kernels."""
        d, d_state = directions[0], directions[0].A.shape[1]
        states = triton.cdiv(d_state, self.SPREAD) if d_state % self.SPREAD == 0 else 1
        return {
            **self._asdict(),
            "LANES": self.lanes,
            "K": INTERVAL,
            "REVERSE": tuple(d.reverse for d in directions),
            "U_PACK": self.pack(d, *(d.u for d in directions)),
            "DT_PACK": self.pack(d, *(d.dt for d in directions)),
            "B_PACK": pack(states, *(d.B for d in directions)),
            "C_PACK": pack(states, *(d.C for d in directions)),
        }


def spread_of_fours(d_state: int) -> int:
    """Lanes for the states of a channel at four per lane: a power of two, at most a warp."""
    return min(32, triton.next_power_of_2(triton.cdiv(d_state, 4)))


def pack(count: int, *tensors: Tensor) -> int:
    """How many of `count` neighbours one aligned load can take, from any row of any of the tensors."""
    if any(t.element_size() != 2 for t in tensors):
        return 1
    places = [(t.data_ptr() // 2, *row_strides(t)) for t in tensors]
    for size in (4, 2):
        if count % size == 0 and all(start % size == 0 and stride % size == 0 for start, _, stride in places):
            return size
    return 1
