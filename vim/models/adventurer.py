"""Adventurer: causal Mamba-2 blocks that begin with the mean of all tokens, as timm models.

Source: Wang et al. 2024, arXiv 2410.07599; checked against the authors' code, wangf3014/Adventurer.
In shapes: B batch, P patches, L = P + 1 tokens, D embed_dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.layers import Mamba2, RMSNorm, SwiGLU, add_and_norm, add_mlp, pre_norm, recompute_all_but_scans
from vim.layers.rename import rename

from .backbone import GlobalPool, PlainBackbone, WeightInit, create
from .block import ResidualBlock, drop_path_rates
from .official import NAMES_WITH_MLP
from .patch_embed import Size
from .pretrained_cfg import in1k_cfg
from .token_layout import Layout, TokenLayout

__all__ = ["Adventurer", "default_cfgs"]  # timm adds the entry points

MLP_RATIO = 2.5

# Official name -> ours.
NAMES = {
    r"layers\.(\d+)\.mixer\.(conv1d\..*|A_log|D|dt_bias)": r"blocks.\1.mixer.ssm.\2",
    **NAMES_WITH_MLP,
}


class AdventurerBlock(ResidualBlock):
    """x + mixer(heading, norm(x)), then x + mlp(norm_mlp(x)), (B, L, D) -> (B, L, D); the class token is last.

    The heading is the mean of the normalised tokens. The mixer is causal: with the heading in front, every token sees a
    summary of the image. What the mixer returns at its place is dropped.

    Args: mixer: causal, (B, 1 + L, D) -> the same shape. flipped: the mixer reads the patches from last to first.
    """

    def __init__(self, dim: int, mixer: nn.Module, flipped: bool, drop_path: float, *, device=None, dtype=None):
        super().__init__(drop_path)
        dd = {"device": device, "dtype": dtype}
        self.norm = RMSNorm(dim, eps=1e-5, **dd)
        self.mixer = mixer
        self.norm_mlp = RMSNorm(dim, eps=1e-5, **dd)
        self.mlp = SwiGLU(dim, int(MLP_RATIO * dim), **dd)
        self.flipped = flipped

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """layout: not used; the blocks of other families need it."""
        scales = self.drop_scale(x), self.drop_scale(x)  # here, because what is recomputed must draw no random numbers
        if self._recomputes():
            return recompute_all_but_scans(lambda x: self._whole(x, *scales), x)
        return self._whole(x, *scales)

    def _whole(self, x: Tensor, mixer_scale: Tensor | None, mlp_scale: Tensor | None) -> Tensor:
        reverse = self.flipped
        x, tokens = pre_norm(self.norm, x, heading=True, reverse=reverse)
        x, tokens = add_and_norm(x, self.mixer(tokens), self.norm_mlp, scale=mixer_scale, heading=True, reverse=reverse)
        return add_mlp(x, self.mlp, tokens, mlp_scale)

    def mixer_places(self, layout: Layout, length: int) -> Tensor:
        """Behind the heading."""
        places = torch.arange(1, length + 1)
        return torch.cat((places[:-1].flip(0), places[-1:])) if self.flipped else places


class Adventurer(PlainBackbone):
    """Adventurer classifier and backbone, with timm's interface of a plain model.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, global_pool, dynamic_img_size, drop_rate,
            weight_init: see VisionMamba.
        d_state, d_conv, expand, head_dim: of the mixer, see `Mamba2`.
        flipped_blocks: numbers of the blocks that read the patches from last to first. None: 2 and 3, as the released
            code does and its weights need. The paper flips every second pair of blocks: 2, 3, 6, 7, ...
        drop_path_rate: stochastic depth: 0 in the first two blocks, then rising linearly, as in the released code. The
            last block has drop_path_rate * (depth - 2) / (depth - 1).

    Raises: ValueError for options that do not exist or do not go together.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 12,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        flipped_blocks: Sequence[int] | None = None,
        global_pool: GlobalPool = "token",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: WeightInit = "",
        device=None,
        dtype=None,
    ):
        if flipped_blocks is not None and not all(0 <= block < depth for block in flipped_blocks):
            raise ValueError(f"flipped_blocks must be from 0 to depth - 1 = {depth - 1}, got {list(flipped_blocks)}")
        dd = {"device": device, "dtype": dtype}
        sizes = img_size, patch_size, None, in_chans, embed_dim
        super().__init__(*sizes, TokenLayout("last"), dynamic_img_size=dynamic_img_size, **dd)
        flipped = (2, 3) if flipped_blocks is None else tuple(flipped_blocks)
        rates = [0.0, *drop_path_rates(drop_path_rate, depth)][:depth]
        self.blocks = nn.Sequential(
            *(
                AdventurerBlock(
                    embed_dim, Mamba2(embed_dim, d_state, d_conv, expand, head_dim, **dd), i in flipped, rate, **dd
                )
                for i, rate in enumerate(rates)
            )
        )
        norm = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self._add_head(norm, num_classes, global_pool, drop_rate, weight_init, **dd)

    def to_native(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of wangf3014/Adventurer, with its keys in any order.

        The class entry of the official position table is the last one; here it is the first, as timm expects. (The
        authors' own resizing takes the first for it, which moves every patch by one.)
        """
        out = {rename(NAMES, key): value for key, value in official.items()}
        if "pos_embed" in out:
            out["pos_embed"] = out["pos_embed"].roll(1, 1)
        return out


def _cfg(file: str, size: int = 224, crop_pct: float = 0.875) -> dict[str, Any]:
    return in1k_cfg(
        "Wangf3014/Adventurer",
        file,
        size,
        crop_pct=crop_pct,
        paper_ids="arXiv:2410.07599",
        paper_name="Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency",
        origin_url="https://github.com/wangf3014/Adventurer",
        notes=("licence: the authors state none",),
    )


default_cfgs = generate_default_cfgs(
    {
        "adventurer_tiny.wangf3014_in1k": _cfg("adventurer_tiny_patch16_224.pth"),
        "adventurer_small.wangf3014_in1k": _cfg("adventurer_small_patch16_224.pth"),
        "adventurer_base.wangf3014_in1k": _cfg("adventurer_base_patch16_224.pth"),
        "adventurer_base.wangf3014_in1k_384": _cfg("adventurer_base_patch16_384.pth", 384, 1.0),
        "adventurer_base.wangf3014_in1k_448": _cfg("adventurer_base_patch16_448.pth", 448, 1.0),
        "adventurer_base_patch8.wangf3014_in1k": _cfg("adventurer_base_patch8_224.pth", 224, 1.0),
        "adventurer_base_patch8.wangf3014_in1k_448": _cfg("adventurer_base_patch8_448.pth", 448, 1.0),
        "adventurer_large.wangf3014_in1k": _cfg("adventurer_large_patch16_224.pth"),
    }
)

# Arguments of each variant that differ from Adventurer's defaults. Arguments of timm.create_model override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "adventurer_tiny": {},
    "adventurer_small": {"embed_dim": 512},
    "adventurer_base": {"embed_dim": 768},
    "adventurer_base_patch8": {"embed_dim": 768, "patch_size": 8},
    "adventurer_large": {"embed_dim": 1024, "depth": 24},
}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Adventurer:
    return create(Adventurer, variant, pretrained, VARIANTS[variant] | kwargs)


@register_model
def adventurer_tiny(pretrained: bool = False, **kwargs) -> Adventurer:
    return _create("adventurer_tiny", pretrained, kwargs)


@register_model
def adventurer_small(pretrained: bool = False, **kwargs) -> Adventurer:
    return _create("adventurer_small", pretrained, kwargs)


@register_model
def adventurer_base(pretrained: bool = False, **kwargs) -> Adventurer:
    return _create("adventurer_base", pretrained, kwargs)


@register_model
def adventurer_base_patch8(pretrained: bool = False, **kwargs) -> Adventurer:
    return _create("adventurer_base_patch8", pretrained, kwargs)


@register_model
def adventurer_large(pretrained: bool = False, **kwargs) -> Adventurer:
    return _create("adventurer_large", pretrained, kwargs)
