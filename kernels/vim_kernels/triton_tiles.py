# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""What the Triton scan kernels share: how states lie over the lanes of a warp, and the functions of one step.

A program is one warp. It owns a block of channels of one batch entry and one direction, with the states in registers
as a tuple of tiles. The shape of a tile says which lane holds what:

    tile i [REPEAT, SPREAD, LANES] holds state n = p * tiles + i of channel c = l * REPEAT + r of the block

SPREAD * LANES = 32: a lane holds REPEAT channels and d_state / SPREAD states of each. With SPREAD 1 all states of a
channel are in one thread, and the sum over states in y needs no shuffle. With SPREAD 4 a warp holds fewer channels,
which gives few rows to more warps, and in the backward it balances the sums over channels (dB, dC) against those over
states (du, d_delta): for 16 channels of 16 states a step takes 32 to 40 shuffles, where SPREAD 1 takes 160 for 32.

Triton lays a load out by what is contiguous in memory and drags that layout into the arithmetic. So neighbours in a
tile are neighbours in memory along REPEAT only: states in a row of memory stand in different tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .directions import Direction

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pick(pair, direction):
    """The item of this program's direction."""
    if len(pair) == 1:
        one = pair[0]
    else:
        one = pair[0] if direction == 0 else pair[1]
    return one


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if x.dtype == tl.float64:
        w = 1 + e
        log1p = tl.log(w) + (e - (w - 1)) / w
    else:
        # Minimax polynomial of log1p(e) / e on [0, 1], relative error 1.7e-7 in fp32: log(1 + e) would lose the digits
        # of a small step, and the hardware logarithm would queue for the unit that computes the exponentials.
        p = 0.005232694558799267 * e - 0.02950524352490902
        p = p * e + 0.07822596281766891
        p = p * e - 0.13663247227668762
        p = p * e + 0.19106008112430573
        p = p * e - 0.2484298199415207
        p = p * e + 0.3331909775733948
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
        log1p = e * p
    return tl.where(x > 20, x, tl.maximum(x, 0.0) + log1p)


@triton.jit
def step_size(dt, mask, bias, SOFTPLUS: tl.constexpr, S: tl.constexpr):
    """(delta, dt + bias)"""
    raw = tl.load(dt, mask, 0.0).to(S)
    if bias is not None:
        raw += bias
    delta = raw
    if SOFTPLUS:
        delta = softplus(raw)
    return delta, raw


@triton.jit
def zeros(TILES: tl.constexpr, REPEAT: tl.constexpr, SPREAD: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros([REPEAT, SPREAD, LANES], S),)
    return tiles


@triton.jit
def load_states(ptr, mask, N: tl.constexpr, SPREAD: tl.constexpr, S: tl.constexpr):
    """The tiles of a tensor (..., N) where `ptr` points at state 0 of each channel (or of the row, for B and C)."""
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    n = tl.arange(0, SPREAD)[None, :, None] * TILES
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (tl.load(ptr + n + i, mask & (n + i < N), 0.0).to(S),)
    return tiles


@triton.jit
def store_states(ptr, tiles, mask, N: tl.constexpr, SPREAD: tl.constexpr):
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    n = tl.arange(0, SPREAD)[None, :, None] * TILES
    for i in tl.static_range(TILES):
        tl.store(ptr + n + i, tiles[i], mask & (n + i < N))


class Tile(NamedTuple):
    """Channels a lane, lanes a channel's states are spread over, and lanes for channels."""

    REPEAT: int
    SPREAD: int
    LANES: int

    @classmethod
    def spread_over(cls, spread: int, repeat: int = 1) -> "Tile":
        """The states of a channel over `spread` lanes, rounded up to a power of two."""
        spread = min(32, triton.next_power_of_2(spread))
        return cls(repeat, spread, 32 // spread)

    def blocks(self, d: Direction) -> int:
        """Blocks of channels in a group of channels that share B and C."""
        return triton.cdiv(d.u.shape[2] // d.B.shape[2], self.REPEAT * self.LANES)

    def programs(self, d: Direction, directions: int) -> int:
        return self.blocks(d) * d.B.shape[2] * d.u.shape[0] * directions
