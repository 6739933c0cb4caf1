"""Vision Mamba (Vim): a plain backbone of bidirectional Mamba blocks, as timm models.

Source: Zhu et al. 2024, arXiv 2401.09417; checked against the authors' code.
"""

from typing import Any, Literal, get_args

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.layers.checks import check_choice

from . import official
from .backbone import GlobalPool, PlainBackbone, WeightInit, create
from .block import Block, drop_path_rates
from .checkpoint_filter import checkpoint_filter_fn
from .mixers import Mixer, create_mixer
from .patch_embed import Size
from .pretrained_cfg import in1k_cfg
from .token_layout import ScanOrder, TokenLayout

__all__ = ["VisionMamba", "checkpoint_filter_fn", "default_cfgs"]  # timm adds the entry points

ClassToken = Literal["middle", "first", "both", "none"]


class VisionMamba(PlainBackbone):
    """Vision Mamba classifier and backbone, with timm's interface of a plain model.

    Args:
        img_size: height and width of the images in pixels. `set_input_size` changes it; with `dynamic_img_size` it may
            differ from call to call.
        patch_size: edge of a patch in pixels. patch_stride: pixels between patches, patch_size if None.
        in_chans: image channels. num_classes: classes of the head; 0 for no head.
        embed_dim, depth: width and number of blocks.
        d_state, d_conv, expand: 16, 4 and 2 if None, see `BiMamba`; only for mixers that have them.
        mixer: the layer that mixes the tokens, see `create_mixer`. Vim has "bimamba". "s4nd" works on the grid of the
            patches and takes no class token.
        scan_order: order of the patches in the sequence, see `patch_order`. Vim has "raster". "cross" alternates
            between rows and columns, block by block.
        class_token: place of the class token in the sequence: "middle" (the paper's), "first", "both" (one at each
            end, averaged by token pooling) or "none".
        global_pool: "token", "avg", "max" or "avgmax" over the patches, or "" for none.
        dynamic_img_size: take images of any size and resample the position table at every call.
        drop_rate: dropout before the head. drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        weight_init: "skip" leaves tables and head uninitialised, for a model that will load its weights.

    Raises: ValueError for options that do not exist or do not go together.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        patch_stride: Size | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: int | None = None,
        mixer: Mixer = "bimamba",
        scan_order: ScanOrder = "raster",
        class_token: ClassToken = "middle",
        global_pool: GlobalPool = "token",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: WeightInit = "",
        device=None,
        dtype=None,
    ):
        check_choice("class_token", class_token, get_args(ClassToken))
        check_choice("scan_order", scan_order, get_args(ScanOrder))
        if mixer == "s4nd" and (class_token, scan_order) != ("none", "raster"):
            raise ValueError(
                f"mixer 's4nd' works on the grid of the patches and needs class_token 'none' and scan_order 'raster', "
                f"got {class_token!r} and {scan_order!r}"
            )
        dd = {"device": device, "dtype": dtype}
        cycle = ("raster", "column") if scan_order == "cross" else (scan_order,)
        orders = [cycle[block % len(cycle)] for block in range(depth)]
        layout = TokenLayout(class_token, orders=set(orders) - {"raster"})
        sizes = img_size, patch_size, patch_stride, in_chans, embed_dim
        super().__init__(*sizes, layout, dynamic_img_size=dynamic_img_size, **dd)

        tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        options = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, create_mixer(mixer, embed_dim, tokens, **options, **dd), rate, order=order, **dd)
                for order, rate in zip(orders, drop_path_rates(drop_path_rate, depth), strict=True)
            )
        )
        self._add_head(nn.RMSNorm(embed_dim, eps=1e-5, **dd), num_classes, global_pool, drop_rate, weight_init, **dd)

    def to_native(self, official_weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of hustvl/Vim, with its keys in any order; see `official.to_native`."""
        return official.to_native(official_weights, self.class_token)


def _cfg(repo: str = "", file: str = "", **changes) -> dict[str, Any]:
    # Crop, mean and std are those of the authors' evaluation transform. Their model configuration says 0.9, 0.5 and
    # 0.5. No licence is given, because the hub's pages name two different ones for the weights.
    paper = {
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
    }
    return in1k_cfg(repo, file, **paper | changes)


default_cfgs = generate_default_cfgs(
    {
        "vim_nano.untrained": _cfg(),
        "vim_tiny.hustvl_in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_stride8.hustvl_ft_in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small.hustvl_in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_stride8.hustvl_ft_in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        # A third party found that the EMA weights of this file have the reported accuracy.
        "vim_base.hustvl_in1k": _cfg(
            "hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", notes=(official.EMA_NOTE,)
        ),
        "s4nd_tiny.untrained": _cfg(
            paper_ids="arXiv:2210.06583",
            paper_name="S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces",
        ),
        "vim_pixels.untrained": _cfg(input_size=(1, 28, 28), num_classes=10, crop_pct=1.0, mean=(0.5,), std=(0.5,)),
    }
)


_PIXELS = {"img_size": 28, "patch_size": 1, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 4}
# Arguments of each variant that differ from VisionMamba's defaults. Arguments of timm.create_model override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "vim_nano": {"embed_dim": 64, "depth": 4},  # for tests and the quick start
    "vim_tiny": {"embed_dim": 192},
    "vim_tiny_stride8": {"embed_dim": 192, "patch_stride": 8},
    "vim_small": {"embed_dim": 384},
    "vim_small_stride8": {"embed_dim": 384, "patch_stride": 8},
    "vim_base": {"embed_dim": 768},
    "s4nd_tiny": {"embed_dim": 192, "mixer": "s4nd", "d_state": 64, "class_token": "none", "global_pool": "avg"},
    # A sequence of pixels, row by row; `mixer` selects another layer.
    "vim_pixels": _PIXELS | {"class_token": "none", "global_pool": "avg"},
}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionMamba:
    return create(VisionMamba, variant, pretrained, VARIANTS[variant] | kwargs)


@register_model
def vim_nano(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_nano", pretrained, kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_tiny", pretrained, kwargs)


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_tiny_stride8", pretrained, kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_small", pretrained, kwargs)


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_small_stride8", pretrained, kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_base", pretrained, kwargs)


@register_model
def s4nd_tiny(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("s4nd_tiny", pretrained, kwargs)


@register_model
def vim_pixels(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create("vim_pixels", pretrained, kwargs)
