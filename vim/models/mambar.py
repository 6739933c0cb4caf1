"""Mamba-R: Vim with registers among its patches in place of the class token, as timm models.

Source: Wang et al. 2024, arXiv 2405.14858; checked against the authors' code, wangf3014/Mamba-Reg.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vim.layers import BiMamba, RMSNorm
from vim.layers.rename import rename

from .backbone import GlobalPool, PlainBackbone, WeightInit, create
from .block import Block, drop_path_rates
from .official import NAMES
from .patch_embed import Size
from .pretrained_cfg import in1k_cfg
from .token_layout import TokenLayout

__all__ = ["MambaR", "default_cfgs"]  # timm adds the entry points


class MambaR(PlainBackbone):
    """Mamba-R classifier and backbone, with timm's interface of a plain model.

    Registers stand among the patches, see `TokenLayout.places`. They have a position table of their own,
    `pos_embed_cls`. For the head, each is projected to register_dim channels (`neck`), then all of them joined are
    normalised (`norm_neck`).

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, global_pool, dynamic_img_size, drop_rate,
            drop_path_rate, weight_init: see VisionMamba. Pooling by "token" joins the registers.
        num_registers: number of registers, at least 1.
        register_dim: channels of a register for the head, embed_dim / r in the paper; None: embed_dim, without neck
            and norm_neck.

    Raises: ValueError for options that do not exist or do not go together.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        num_registers: int = 12,
        register_dim: int | None = None,
        global_pool: GlobalPool = "token",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: WeightInit = "",
        device=None,
        dtype=None,
    ):
        for name, value in (("num_registers", num_registers), ("register_dim", register_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dd = {"device": device, "dtype": dtype}
        sizes = img_size, patch_size, None, in_chans, embed_dim
        layout = TokenLayout("registers", num_registers=num_registers)
        super().__init__(*sizes, layout, dynamic_img_size=dynamic_img_size, table_tokens=0, **dd)
        self.register_dim = register_dim
        self.pos_embed_cls = nn.Parameter(torch.empty(1, num_registers, embed_dim, **dd))
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(Block(embed_dim, BiMamba(embed_dim, **dd), rate, **dd) for rate in rates))
        norm = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self._add_head(norm, num_classes, global_pool, drop_rate, weight_init, **dd)
        self.register_load_state_dict_pre_hook(_refuse_even_registers)

    def _class_positions(self, pos_embed: Tensor) -> Tensor:
        return self.pos_embed_cls

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool != "token":
            return super()._pool(x)
        registers = self.neck(x[:, : self.num_prefix_tokens])  # (B, T, register_dim)
        return self.norm_neck(registers.flatten(1))

    def _set_pool(self, global_pool: str, *, device=None, dtype=None) -> None:
        super()._set_pool(global_pool)
        self.neck: nn.Module = nn.Identity()
        self.norm_neck: nn.Module = nn.Identity()
        if global_pool != "token":
            return
        width = self.embed_dim if self.register_dim is None else self.register_dim
        self.head_hidden_size = self.num_prefix_tokens * width
        if self.register_dim is not None:
            dd = {"device": device, "dtype": dtype}
            self.neck = nn.Linear(self.embed_dim, width, bias=False, **dd)
            self.norm_neck = RMSNorm(self.head_hidden_size, eps=1e-5, **dd)  # one norm over all registers
            trunc_normal_(self.neck.weight, std=0.02)

    def to_native(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of wangf3014/Mamba-Reg, with its keys in any order.

        Raises: ValueError for a file without registers.
        """
        if "cls_token" in official and "pos_embed_cls" not in official:
            raise ValueError("the checkpoint has no pos_embed_cls, so it is not of Mamba-R; load it into its own model")
        return {rename(NAMES, key): value for key, value in official.items()}


def _refuse_even_registers(model: MambaR, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Load-state-dict pre-hook. Raises: ValueError for weights of another arrangement of registers."""
    if prefix + "cls_token" in state_dict and prefix + "pos_embed_cls" not in state_dict:
        raise ValueError(
            "the weights have no pos_embed_cls: they are not of Mamba-R, or of vim_small_registers before version 0.3, "
            "which spread its registers evenly; load them with the version that made them"
        )


def _cfg(file: str = "", **changes) -> dict[str, Any]:
    paper: dict[str, Any] = {
        "crop_pct": 1.0,
        "paper_ids": "arXiv:2405.14858",
        "paper_name": "Mamba-R: Vision Mamba Also Needs Registers",
        "origin_url": "https://github.com/wangf3014/Mamba-Reg",
        "notes": ("licence: the authors state none",) if file else None,
    }
    return in1k_cfg("Wangf3014/Mamba-Reg" if file else "", file, **paper | changes)


default_cfgs = generate_default_cfgs(
    {
        "mambar_tiny.untrained": _cfg(),
        "mambar_small.wangf3014_in1k": _cfg("mambar_small_patch16_224.pth"),
        "mambar_base.wangf3014_in1k": _cfg("mambar_base_patch16_224.pth"),
        "mambar_large.wangf3014_in1k": _cfg("mambar_large_patch16_224.pth"),
    }
)

# Arguments of each variant that differ from MambaR's defaults. Arguments of timm.create_model override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "mambar_tiny": {},
    "mambar_small": {"embed_dim": 384, "register_dim": 192},
    "mambar_base": {"embed_dim": 768, "register_dim": 192},
    "mambar_large": {"embed_dim": 1024, "depth": 48, "num_registers": 16, "register_dim": 128},
}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> MambaR:
    return create(MambaR, variant, pretrained, VARIANTS[variant] | kwargs)


@register_model
def mambar_tiny(pretrained: bool = False, **kwargs) -> MambaR:
    return _create("mambar_tiny", pretrained, kwargs)


@register_model
def mambar_small(pretrained: bool = False, **kwargs) -> MambaR:
    return _create("mambar_small", pretrained, kwargs)


@register_model
def mambar_base(pretrained: bool = False, **kwargs) -> MambaR:
    return _create("mambar_base", pretrained, kwargs)


@register_model
def mambar_large(pretrained: bool = False, **kwargs) -> MambaR:
    return _create("mambar_large", pretrained, kwargs)


register_model_deprecations(__name__, {"vim_small_registers": "mambar_small"})
