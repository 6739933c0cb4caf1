"""VideoMamba's image models: Vim with the class token first and the directions added, as timm models.

Their tensors have the names and shapes of Vim's, so nothing in a file tells the two apart: the name of the model must.

Source: Li et al. 2024, arXiv 2403.06977; checked against the authors' code, OpenGVLab/VideoMamba.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.layers import BiMamba
from vim.layers.rename import rename

from .backbone import GlobalPool, PlainBackbone, WeightInit, create
from .block import Block, drop_path_rates
from .official import NAMES, ONE_SET_NOTE
from .patch_embed import Size
from .pretrained_cfg import in1k_cfg
from .token_layout import TokenLayout

__all__ = ["VideoMamba", "default_cfgs"]  # timm adds the entry points


class VideoMamba(PlainBackbone):
    """VideoMamba classifier and backbone for images, with timm's interface of a plain model.

    Args: see VisionMamba.

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
        global_pool: GlobalPool = "token",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: WeightInit = "",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        sizes = img_size, patch_size, None, in_chans, embed_dim
        super().__init__(*sizes, TokenLayout("first"), dynamic_img_size=dynamic_img_size, **dd)
        # The directions are added (scale 1), where Vim takes their mean.
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, BiMamba(embed_dim, scale=1.0, **dd), rate, **dd)
                for rate in drop_path_rates(drop_path_rate, depth)
            )
        )
        norm = nn.RMSNorm(embed_dim, eps=1e-5, **dd)
        self._add_head(norm, num_classes, global_pool, drop_rate, weight_init, **dd)

    def to_native(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of OpenGVLab/VideoMamba's image models, with its keys in any order.

        Self-distillation leaves a second head in a file, which the model does not need.

        Raises: ValueError for a file of a video model.
        """
        filters = official.get("patch_embed.proj.weight")
        if filters is not None and filters.dim() == 5:
            raise ValueError(
                f"the checkpoint's patches are {tuple(filters.shape[2:])} of a video, a model of images needs two "
                "dimensions; take an image file, named ..._in1k_res..."
            )
        return {rename(NAMES, key): value for key, value in official.items() if not key.startswith("distill_head.")}


def _cfg(file: str, size: int = 224) -> dict[str, Any]:
    return in1k_cfg(
        "OpenGVLab/VideoMamba",
        file,
        size,
        license="apache-2.0",
        paper_ids="arXiv:2403.06977",
        paper_name="VideoMamba: State Space Model for Efficient Video Understanding",
        origin_url="https://github.com/OpenGVLab/VideoMamba",
        notes=(ONE_SET_NOTE,),
    )


default_cfgs = generate_default_cfgs(
    {
        "videomamba_tiny.opengvlab_in1k": _cfg("videomamba_t16_in1k_res224.pth"),
        "videomamba_tiny.opengvlab_in1k_448": _cfg("videomamba_t16_in1k_res224to448.pth", 448),
        "videomamba_tiny.opengvlab_in1k_576": _cfg("videomamba_t16_in1k_res224to448to576.pth", 576),
        "videomamba_small.opengvlab_in1k": _cfg("videomamba_s16_in1k_res224.pth"),
        "videomamba_small.opengvlab_in1k_448": _cfg("videomamba_s16_in1k_res224to448.pth", 448),
        "videomamba_small.opengvlab_in1k_576": _cfg("videomamba_s16_in1k_res224to448to576.pth", 576),
        "videomamba_middle.opengvlab_in1k": _cfg("videomamba_m16_in1k_res224.pth"),
        "videomamba_middle.opengvlab_in1k_448": _cfg("videomamba_m16_in1k_res224to448.pth", 448),
        "videomamba_middle.opengvlab_in1k_576": _cfg("videomamba_m16_in1k_res224to448to576.pth", 576),
        "videomamba_base.opengvlab_in1k": _cfg("videomamba_b16_in1k_res224.pth"),
    }
)

# Arguments of each variant that differ from VideoMamba's defaults. Arguments of timm.create_model override them.
VARIANTS: dict[str, dict[str, Any]] = {
    "videomamba_tiny": {},
    "videomamba_small": {"embed_dim": 384},
    "videomamba_middle": {"embed_dim": 576, "depth": 32},
    "videomamba_base": {"embed_dim": 768},
}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VideoMamba:
    return create(VideoMamba, variant, pretrained, VARIANTS[variant] | kwargs)


@register_model
def videomamba_tiny(pretrained: bool = False, **kwargs) -> VideoMamba:
    return _create("videomamba_tiny", pretrained, kwargs)


@register_model
def videomamba_small(pretrained: bool = False, **kwargs) -> VideoMamba:
    return _create("videomamba_small", pretrained, kwargs)


@register_model
def videomamba_middle(pretrained: bool = False, **kwargs) -> VideoMamba:
    return _create("videomamba_middle", pretrained, kwargs)


@register_model
def videomamba_base(pretrained: bool = False, **kwargs) -> VideoMamba:
    return _create("videomamba_base", pretrained, kwargs)
