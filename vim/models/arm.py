"""ARM: blocks that scan an image along its rows and columns, for autoregressive pretraining, as timm models.

Source: Ren et al. 2024, arXiv 2406.07537; checked against the authors' code, OliverRensu/ARM.
"""

import re
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.layers import LayerNorm, RowColumnMamba, SwiGLU
from vim.layers.rename import rename

from .backbone import GlobalPool, PlainBackbone, WeightInit, create
from .block import ResidualBlock, drop_path_rates
from .official import EMA_NOTE, NAMES_WITH_MLP
from .patch_embed import Size
from .pretrained_cfg import in1k_cfg
from .token_layout import Layout, TokenLayout

__all__ = ["ARM", "default_cfgs"]  # timm adds the entry points

_SSM = r"layers\.(\d+)\.mixer\.(A|D|conv1d|x_proj|dt_proj)"
# Official name -> ours. The authors mark the directions: none, `_b`, `_c` and `_c_b`, as in conv1d_c.weight, A_c_b_log.
NAMES = {
    rf"{_SSM}_c_b(|_log|\..*)": r"blocks.\1.mixer.column_backward_ssm.\2\3",
    rf"{_SSM}_c(|_log|\..*)": r"blocks.\1.mixer.column_forward_ssm.\2\3",
    rf"{_SSM}_b(|_log|\..*)": r"blocks.\1.mixer.row_backward_ssm.\2\3",
    rf"{_SSM}(|_log|\..*)": r"blocks.\1.mixer.row_forward_ssm.\2\3",
    **NAMES_WITH_MLP,
}
# The decoder of a pretraining file.
_DECODER = r"(ar_token|ar_norm|ar_pred|dec_block|dec_pos_embed|enc2dec|mask|norm_[1-4])(|\..*)"


class ARMBlock(ResidualBlock):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), (B, L, D) -> (B, L, D).

    Args: mixer: takes the sequence and its order by columns, see `RowColumnMamba`.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, *, device=None, dtype=None):
        super().__init__(drop_path)
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = mixer
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = SwiGLU(dim, dim * 4 * 2 // 3, **dd)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        columns = layout.orders["column"]
        x = self.add(x, self.norm1, lambda x: self.mixer(x, columns))
        return self.add(x, self.norm2, self.mlp)


class ARM(PlainBackbone):
    """ARM classifier and backbone, with timm's interface of a plain model.

    The class token stands in the middle, also for the scans along the columns. The head takes the mean of the patches.
    On grids with an odd number of patches the authors' code takes the mean of two means, before and behind the class
    token, though one of them has a patch more; here every patch has the same weight.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, global_pool, dynamic_img_size, drop_rate,
            weight_init: see VisionMamba.
        d_state, d_conv: of the mixer, see `RowColumnMamba`.
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
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        d_conv: int = 4,
        global_pool: GlobalPool = "avg",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: WeightInit = "",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        sizes = img_size, patch_size, None, in_chans, embed_dim
        layout = TokenLayout("middle", orders=("column",))
        super().__init__(*sizes, layout, dynamic_img_size=dynamic_img_size, **dd)
        rates = [0.0, *drop_path_rates(drop_path_rate, depth)][:depth]
        self.blocks = nn.Sequential(
            *(ARMBlock(embed_dim, RowColumnMamba(embed_dim, d_state, d_conv, **dd), rate, **dd) for rate in rates)
        )
        norm = nn.LayerNorm(embed_dim, eps=1e-5, **dd)
        self._add_head(norm, num_classes, global_pool, drop_rate, weight_init, **dd)

    def to_native(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of OliverRensu/ARM, with its keys in any order.

        The class entry of the official position table is in the middle; here it is the first, as timm expects.

        A file of the pretraining has another model, with one direction and a decoder. Its encoder starts all four
        directions alike, as in the authors' fine-tuning; class token and last norm keep the values of this model, the
        class token's position is 0, and there is no head.
        """
        out = {rename(NAMES, key): value for key, value in official.items() if not re.fullmatch(_DECODER, key)}
        table = out.get("pos_embed")
        if "ar_token" in official:
            for key in [key for key in out if ".row_forward_ssm." in key]:
                for direction in ("row_backward_ssm", "column_forward_ssm", "column_backward_ssm"):
                    out[key.replace("row_forward_ssm", direction)] = out[key]
            out |= {key: value for key, value in self.state_dict().items() if re.match(r"cls_token|norm\.", key)}
            if table is not None:
                out["pos_embed"] = torch.cat((torch.zeros_like(table[:, :1]), table), 1)
        elif table is not None:
            out["pos_embed"] = self.token_layout.prefix_first(table)
        return out


def _cfg(size: int = 224, crop_pct: float = 0.875) -> dict[str, Any]:
    return in1k_cfg(
        size=size,
        crop_pct=crop_pct,
        crop_mode="squash",  # the whole image becomes a square
        paper_ids="arXiv:2406.07537",
        paper_name="ARM: Autoregressive Pretraining with Mamba in Vision",
        origin_url="https://github.com/OliverRensu/ARM",
        notes=(
            # The authors do not say which set has the reported accuracy; their evaluation reads this one.
            EMA_NOTE,
            "weights: download a file from https://huggingface.co/OliverRen/ARM and give it as `file`; the authors' "
            "code does not name them",
            "licence: the authors state none",
        ),
    )


default_cfgs = generate_default_cfgs(
    {
        "arm_base.oliverren_in1k": _cfg(),
        "arm_large.oliverren_in1k": _cfg(),
        "arm_huge.oliverren_in1k": _cfg(),
        "arm_huge.oliverren_in1k_384": _cfg(384, 1.0),
    }
)

# Arguments of each variant that differ from ARM's defaults. Arguments of timm.create_model override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "arm_base": {},
    "arm_large": {"embed_dim": 1024, "depth": 24},
    "arm_huge": {"embed_dim": 1536, "depth": 24},
}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> ARM:
    return create(ARM, variant, pretrained, VARIANTS[variant] | kwargs)


@register_model
def arm_base(pretrained: bool = False, **kwargs) -> ARM:
    return _create("arm_base", pretrained, kwargs)


@register_model
def arm_large(pretrained: bool = False, **kwargs) -> ARM:
    return _create("arm_large", pretrained, kwargs)


@register_model
def arm_huge(pretrained: bool = False, **kwargs) -> ARM:
    return _create("arm_huge", pretrained, kwargs)
