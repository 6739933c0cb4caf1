"""Residual blocks: what the families share, and the block of Vim, Mamba-R and VideoMamba."""

from collections.abc import Callable

import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from vim.layers import S4ND, BiMamba, RMSNorm, recompute_all_but_scans
from vim.layers.plain import runs_its_class

from .token_layout import Layout

torch.fx.wrap("rearrange")  # FX keeps the call as a leaf; inside, einops asks for the type of the tensor


class ResidualBlock(nn.Module):
    """Base class of blocks: adds branches to the sequence, with stochastic depth and gradient checkpointing.

    Under autocast a branch returns low precision; the residual stream stays in fp32.
    """

    def __init__(self, drop_path: float):
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.grad_checkpointing = False

    def add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + drop_path(branch(x)), (B, L, D) -> (B, L, D). `branch` must not draw random numbers."""
        recompute = self.grad_checkpointing and self.training
        return x + self.drop_path(recompute_all_but_scans(branch, x) if recompute else branch(x))

    def mixer_places(self, layout: Layout, length: int) -> Tensor:
        """For each of `length` tokens, its place in the sequence that the mixer reads."""
        return torch.arange(length)


class Block(ResidualBlock):
    """x + drop_path(mixer(norm(x))), (B, L, D) -> (B, L, D).

    Args:
        mixer: takes (B, L, D); an S4ND takes (B, height, width, D).
        order: name of the scan order in which the mixer reads the tokens.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, *, order: str = "raster", device=None, dtype=None):
        super().__init__(drop_path)
        self.norm = RMSNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.mixer = mixer
        self.on_grid = isinstance(mixer, S4ND)  # asked here, because the mixer may be wrapped later
        self.order = order

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """layout: None mixes the tokens in the order that they have."""
        y = self._in_one_call(x, layout)
        if y is not None:
            return y
        return self.add(x, lambda x: self._mix(self.norm(x), layout))

    def _in_one_call(self, x: Tensor, layout: Layout | None) -> Tensor | None:
        """The result of `forward` by one kernel; None if the modules must be called."""
        in_order = layout is None or self.order not in layout.orders
        if self.training or not in_order or type(self.mixer) is not BiMamba or not runs_its_class(self.drop_path):
            return None
        return self.mixer.add_in_one_call(x, self.norm)

    def _mix(self, x: Tensor, layout: Layout | None) -> Tensor:
        if layout is None:
            return self.mixer(x)
        if self.on_grid:
            y = self.mixer(rearrange(x, "b (h w) d -> b h w d", h=layout.grid[0], w=layout.grid[1]))
            return rearrange(y, "b h w d -> b (h w) d")
        order = layout.orders.get(self.order)  # none for "raster"
        return self.mixer(x) if order is None else self.mixer(x[:, order[0]])[:, order[1]]

    def mixer_places(self, layout: Layout, length: int) -> Tensor:
        order = layout.orders.get(self.order)
        return super().mixer_places(layout, length) if order is None else order[1]


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
