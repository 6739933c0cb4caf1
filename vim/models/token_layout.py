"""Patches and class tokens as a sequence: where the class tokens stand, and in which order a block reads it.

In shapes: B batch, P patches, T class tokens or registers, L = P + T, D channels.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .patch_embed import Grid

Place = Literal["middle", "first", "last", "both", "registers", "none"]
ScanOrder = Literal["raster", "column", "zigzag", "window", "cross"]
WINDOW = 7  # patches per edge; an image of 224 pixels has 14

Order = tuple[Tensor, Tensor]  # indices (L,) from raster order to another one, and back


class Layout(NamedTuple):
    """The layout of one batch of images: the grid of the patches, and the scan orders by name, without "raster"."""

    grid: Grid
    orders: dict[str, Order]


class TokenLayout(nn.Module):
    """Puts class tokens among the patches and takes them out again; holds the scan orders of the blocks.

    Args:
        class_token: "middle", "first", "last", "both" (one at each end), "registers" (see `places`) or "none".
        num_registers: only for class_token "registers".
        orders: names of the scan orders besides "raster", see `patch_order`.
    """

    def __init__(self, class_token: Place, *, num_registers: int = 0, orders: Iterable[str] = ()):
        super().__init__()
        self.class_token = class_token
        numbers = {"middle": 1, "first": 1, "last": 1, "both": 2, "registers": num_registers, "none": 0}
        self.num_tokens = numbers[class_token]
        self.orders = sorted(orders)

    def places(self, num_patches: int) -> tuple[int, ...]:
        """Indices of the class tokens in a sequence with `num_patches` patches.

        Registers: one after every num_patches // (registers + 1) patches. The rest follows the last one, as in the code
        of Mamba-R; its paper spreads them evenly.
        """
        if self.class_token == "registers":
            gap = num_patches // (self.num_tokens + 1)
            return tuple(gap + i * (gap + 1) for i in range(self.num_tokens))
        places = {
            "middle": (num_patches // 2,),
            "first": (0,),
            "last": (num_patches,),
            "both": (0, num_patches + 1),
            "none": (),
        }
        return places[self.class_token]

    def insert(self, patches: Tensor, class_tokens: Tensor) -> Tensor:
        """Patches (B, P, D) and class tokens (B, T, D) -> the sequence (B, L, D)."""
        pieces, done = [], 0
        for i, place in enumerate(self.places(patches.shape[1])):
            pieces += [patches[:, done : place - i], class_tokens[:, i : i + 1]]
            done = place - i
        return torch.cat([*pieces, patches[:, done:]], 1)

    def prefix_first(self, x: Tensor) -> Tensor:
        """The sequence (B, L, D) -> class tokens, then patches, (B, T + P, D)."""
        if self.class_token in ("first", "none"):
            return x
        places = self.places(x.shape[1] - self.num_tokens)
        prefix = [x[:, place : place + 1] for place in places]
        starts, ends = (0, *(place + 1 for place in places)), (*places, x.shape[1])
        return torch.cat([*prefix, *(x[:, start:end] for start, end in zip(starts, ends, strict=True))], 1)

    def keep_orders(self, grid: Grid, device: torch.device) -> None:
        """Keep the indices for images of the usual size, in buffers that are not saved."""
        for name, (there, back) in self.of(grid, device).orders.items():
            self.register_buffer(f"to_{name}", there, persistent=False)
            self.register_buffer(f"from_{name}", back, persistent=False)

    def kept(self, grid: Grid) -> Layout:
        """The layout of images of the usual size."""
        orders = {name: (getattr(self, f"to_{name}"), getattr(self, f"from_{name}")) for name in self.orders}
        return Layout(grid, orders)

    def of(self, grid: Grid, device: torch.device) -> Layout:
        """The layout of images of any size."""
        places = self.places(grid[0] * grid[1])
        return Layout(grid, {name: token_order(name, grid, places, device) for name in self.orders})


@lru_cache(maxsize=64)
def patch_order(order: str, grid: Grid) -> tuple[int, ...]:
    """Row-major indices of a grid's patches, in the order of the sequence.

    raster: row by row. column: column by column. zigzag: row by row, every other row backwards, so that neighbours in
    the sequence are neighbours in the image. window: windows of 7 x 7 row by row, and row by row within a window;
    windows at the right and lower border may be smaller.

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


def token_order(order: str, grid: Grid, class_places: tuple[int, ...], device: torch.device) -> Order:
    """Indices (L,) from a raster sequence to another order, and back. Class tokens keep their places."""
    length = grid[0] * grid[1] + len(class_places)
    patches = [place for place in range(length) if place not in class_places]
    there, back = list(range(length)), list(range(length))
    for place, patch in zip(patches, patch_order(order, grid), strict=True):
        there[place] = patches[patch]
        back[patches[patch]] = place
    return torch.tensor(there, device=device), torch.tensor(back, device=device)
