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
    height, width = grid
    places = [(row, column) for row in range(height) for column in range(width)]
    key = {
        "raster": lambda row, column: (row, column),
        "column": lambda row, column: (column, row),
        "zigzag": lambda row, column: (row, -column if row % 2 else column),
        "window": lambda row, column: (row // WINDOW, column // WINDOW, row, column),
    }[order]
    return tuple(row * width + column for row, column in sorted(places, key=lambda place: key(*place)))


def token_order(order: str, grid: tuple[int, int], prefix_places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Indices (L,) that bring a row-by-row sequence into an order, and back. Tokens that are no patches stay where they
    are in the sequence.

    Args:
        prefix_places: theirs.
    """
    length = grid[0] * grid[1] + len(prefix_places)
    patches = [place for place in range(length) if place not in prefix_places]
    taken, back = list(range(length)), list(range(length))
    for place, patch in zip(patches, patch_order(order, grid), strict=True):
        taken[place] = patches[patch]
        back[patches[patch]] = place
    # Not on the default device, which is "meta" where a model is made without memory.
    return torch.tensor(taken, device="cpu"), torch.tensor(back, device="cpu")
