"""timm's default cfgs of the variants: where released weights are, and how images become the input."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs

from .official import EMA_NOTE


def _cfg(repo: str = "", file: str = "", **changes) -> dict:
    # Crop, mean and std are those of the authors' evaluation transform. Their model configuration says 0.9, 0.5 and
    # 0.5. No licence is given, because the hub's pages name two different ones for the weights.
    return {
        "hf_hub_id": repo or None,
        "hf_hub_filename": file or None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
    } | changes


default_cfgs = generate_default_cfgs(
    {
        "vim_nano.untrained": _cfg(),
        "vim_tiny.hustvl_in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_stride8.hustvl_ft_in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small.hustvl_in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_stride8.hustvl_ft_in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        # A third party found that the EMA weights of this file have the reported accuracy.
        "vim_base.hustvl_in1k": _cfg("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", notes=(EMA_NOTE,)),
        "vim_small_registers.untrained": _cfg(paper_ids="arXiv:2405.14858"),
        "s4nd_tiny.untrained": _cfg(paper_ids="arXiv:2210.06583"),
        "vim_pixels.untrained": _cfg(input_size=(1, 28, 28), num_classes=10, crop_pct=1.0, mean=(0.5,), std=(0.5,)),
    }
)
