"""Intermediate features of a plain backbone, with the names and arguments of timm and of DINO's tools."""

from typing import Literal

import torch
from einops import rearrange
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .token_layout import Layout

Format = Literal["NCHW", "NLC"]

torch.fx.wrap("rearrange")  # FX keeps the call as a leaf; inside, einops asks for the type of the tensor


class FeatureMaps(nn.Module):
    """Base class of models with blocks of one width.

    In shapes: B batch, P patches, T class tokens, L = P + T, D channels.
    """

    blocks: nn.Sequential
    norm: nn.Module
    num_prefix_tokens: int

    def _layout(self, images: Tensor) -> Layout:
        """The layout of the tokens of images (B, in_chans, H, W)."""
        raise NotImplementedError

    def _embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens in sequence order (B, L, D)."""
        raise NotImplementedError

    def prefix_first(self, x: Tensor) -> Tensor:
        """Tokens in sequence order (B, L, D) -> class tokens, then patches."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Format = "NCHW",
        intermediates_only: bool = False,
    ):
        """Features after chosen blocks.

        Args:
            x: (B, in_chans, H, W). indices: an int n for the last n blocks, a list for those blocks, None for all.
            return_prefix_tokens: return pairs (patches, class tokens (B, T, D)).
            norm: apply the final norm to the intermediates.
            stop_early: skip the blocks behind the last chosen one.
            output_fmt: "NCHW" for maps (B, D, grid height, grid width), "NLC" for (B, P, D).
            intermediates_only: leave out the final features.

        Returns: (final features, as from `forward_features`, and a list of intermediates), or the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        layout = self._layout(x)
        x = self._embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x, layout=layout)
            if i in chosen:
                tokens = self.prefix_first(self.norm(x) if norm else x)
                prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    patches = rearrange(patches, "b (h w) d -> b d h w", h=layout.grid[0], w=layout.grid[1])
                intermediates.append((patches, prefix) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.prefix_first(self.norm(x)), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen intermediates do not need. Returns: their indices."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """`forward_intermediates` with the name and the arguments that DINO's tools use."""
        output_fmt: Format = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )
