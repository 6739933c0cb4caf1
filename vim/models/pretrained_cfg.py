"""timm's pretrained cfg of a model on ImageNet-1k: where released weights are, and how images become the input."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def in1k_cfg(repo: str = "", file: str = "", size: int = 224, **changes: Any) -> dict[str, Any]:
    """Args:
    repo, file: on the hub; empty without released weights.
    size: height and width of the images in pixels.
    changes: other fields of timm's PretrainedCfg.
    """
    return {
        "hf_hub_id": repo or None,
        "hf_hub_filename": file or None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | changes
