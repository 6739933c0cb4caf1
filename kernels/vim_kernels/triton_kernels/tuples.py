# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Tuples of tiles in registers, for kernels that unroll over steps or channels."""

import triton
import triton.language as tl


@triton.jit
def zeros(COUNT: tl.constexpr, like, S: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(like.shape, S),)
    return tiles
