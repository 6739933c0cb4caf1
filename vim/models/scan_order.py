"""Orders in which the patches of an image become a sequence."""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

ScanOrder = Literal["raster", "column", "zigzag", "window", "cross"]
SCAN_ORDERS = ("raster", "column", "zigzag", "window", "cross")
WINDOW = 7  # patches on an edge, of which an image of 224 pixels has twice as many


def order_of_block(scan_order: ScanOrder, block: int) -> str:
    """A block's order: with cross, every other block goes along the columns."""
    return ("raster", "column")[block % 2] if scan_order == "cross" else scan_order


@lru_cache(maxsize=64)
def patch_order(order: str, grid: tuple[int, int]) -> tuple[int, ...]:
    """Row-major indices of a grid's patches in the order of a sequence.

    raster: row by row. column: column by column. zigzag: row by row, every other row backwards, so that neighbours in
    the sequence are neighbours in the image. window: windows of 7 x 7 row by row, each row by row; those at the right
    and lower border may be smaller.

    Source: Yang et al. 2024, arXiv 2403.17695 (PlainMamba) for zigzag; Huang et al. 2024, arXiv 2403.09338 (LocalMamba)
        for window; Liu et al. 2024, arXiv 2401.10166 (VMamba) for both axes.
    """
    at = torch.arange(grid[0] * grid[1]).view(grid)
    if order == "column":
        at = at.T
    elif order == "zigzag":
        at[1::2] = at[1::2].flip(1)
    elif order == "window":
        return tuple(
            int(i) for rows in at.split(WINDOW) for window in rows.split(WINDOW, 1) for i in window.reshape(-1)
        )
    return tuple(at.reshape(-1).tolist())


def token_order(order: str, grid: tuple[int, int], prefix_places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Indices (L,) that bring a row-by-row sequence into an order, and back. Tokens that are no patches stay where they
    are in the sequence.

    Args:
        prefix_places: theirs.
    """
    places = torch.ones(grid[0] * grid[1] + len(prefix_places), dtype=torch.bool)
    places[list(prefix_places)] = False
    taken = torch.arange(len(places))
    taken[places] = taken[places][list(patch_order(order, grid))]
    return taken, taken.argsort()
