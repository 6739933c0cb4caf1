"""Feature pyramids for detection and segmentation on any timm backbone."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import Format, LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from vim.console.errors import ConfigError
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model_at, enable_grad_checkpointing
from vim.timm_models.timm_model import TimmModel

STRIDES = (4, 8, 16, 32)
RGB_CHANNELS = 3
LEVELS = ("0", "1", "2", "3")  # the names by which torchvision's region pooling finds the maps of these strides
TOP = "pool"  # stride 64


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from the single map of a plain backbone.

    Args:
        in_channels, stride: of the map; the stride is a power of two from 4 to 32.
        out_channels: of each level.

    Source: Li et al. 2022, arXiv 2203.16527, "simple feature pyramid", with its LayerNorms.
    """

    def __init__(self, in_channels: int, stride: int, out_channels: int):
        super().__init__()
        self.levels = nn.ModuleList(_level(in_channels, stride, target, out_channels) for target in STRIDES)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


def _level(channels: int, stride: int, target: int, out_channels: int) -> nn.Sequential:
    """Transposed convolutions that double the size and halve the channels, or max pooling; then 1x1 and 3x3."""
    layers: list[nn.Module] = []
    while stride > target:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels, stride = channels // 2, stride // 2
    if stride < target:
        layers.append(nn.MaxPool2d(target // stride))
    for kernel in (1, 3):
        conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
        layers += [conv, LayerNorm2d(out_channels)]
        channels = out_channels
    return nn.Sequential(*layers)


class PyramidBackbone(nn.Module):
    """A timm model with a pyramid, as a backbone of torchvision's detectors: images (B, 3, S, S) -> maps by level.

    A plain model's last map goes through a `SimpleFeaturePyramid`, the maps of a hierarchical model through
    torchvision's FPN. The level of stride 64 takes every second cell of stride 32.

    Args:
        config: of the timm model.
        img_size: S.
        out_channels: of every level.

    Raises: ConfigError for a model without feature maps or with strides that fit no pyramid.
    """

    def __init__(self, config: ModelConfig, img_size: int, out_channels: int = 256):
        super().__init__()
        self.body = _create_body(config, img_size)
        self.out_channels = out_channels
        info = self.body.feature_info
        channels, strides = info.channels(), info.reduction()
        self.plain = len(set(strides)) == 1
        if self.plain:
            if strides[-1] not in STRIDES:
                raise ConfigError(f"{config.name} has a map of stride {strides[-1]}, a pyramid needs one of {STRIDES}")
            grid = getattr(getattr(getattr(self.body, "model", None), "patch_embed", None), "grid_size", None)
            if grid and set(grid) != {img_size // strides[-1]}:
                raise ConfigError(
                    f"{config.name} has {grid[0]} x {grid[1]} patches in {img_size} pixels, a pyramid needs one every "
                    f"{strides[-1]} pixels up to the edge: patches must not overlap"
                )
            self.pyramid: nn.Module = SimpleFeaturePyramid(channels[-1], strides[-1], out_channels)
        else:
            self.taken = [strides.index(stride) for stride in STRIDES if stride in strides]
            if len(self.taken) < len(STRIDES):
                raise ConfigError(f"{config.name} has maps of strides {strides}, a pyramid needs {STRIDES}")
            self.pyramid = FeaturePyramidNetwork([channels[i] for i in self.taken], out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        if getattr(self.body, "output_fmt", None) == Format.NHWC:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if self.plain:
            maps = self.pyramid(maps[-1])
        else:
            maps = self.pyramid({level: maps[i] for level, i in zip(LEVELS, self.taken, strict=True)}).values()
        # fp32: torchvision's anchors get the dtype of the maps, and bf16 is exact only up to 256 pixels.
        levels = {level: m.float() for level, m in zip(LEVELS, maps, strict=True)}
        return levels | {TOP: F.max_pool2d(levels[LEVELS[-1]], 1, 2)}


class OnBackbone(nn.Module):
    """A model on a `PyramidBackbone`, with the methods that a training run calls."""

    BACKBONE: ClassVar[str]  # name of that submodule
    name: str  # of the timm model

    @property
    def backbone(self) -> PyramidBackbone:
        backbone = self.get_submodule(self.BACKBONE)
        assert isinstance(backbone, PyramidBackbone)
        return backbone

    @property
    def body(self) -> TimmModel:
        """The timm model, created with features_only."""
        return self.backbone.body

    def no_weight_decay(self) -> set[str]:
        names: set[str] = getattr(self._timm_model, "no_weight_decay", set)()
        return {f"{self._prefix}{name.removeprefix('*')}" if name[0] != "*" else name for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Layers for layer-wise learning rates: those of the timm model, then one for everything else."""
        if not hasattr(self._timm_model, "group_matcher"):
            raise ConfigError(f"{self.name} has no layer groups as a backbone; leave optim.layer_decay out")
        layers = group_parameters(self._timm_model, self._timm_model.group_matcher(coarse), reverse=True)
        named = {f"{self._prefix}{name}": layer for name, layer in layers.items()}
        return lambda name: named.get(name, float("inf"))

    def set_grad_checkpointing(self) -> None:
        """Recompute the activations of the backbone's blocks in the backward pass."""
        enable_grad_checkpointing(self._timm_model, self.name)

    @property
    def graph_safe_checkpointing(self) -> bool:
        """Whether a CUDA graph can capture the backbone's gradient checkpointing."""
        return getattr(self._timm_model, "graph_safe_checkpointing", False)

    @property
    def _timm_model(self) -> Any:
        """The model itself: timm wraps plain models in a class without their methods."""
        return getattr(self.body, "model", self.body)

    @property
    def _prefix(self) -> str:
        return f"{self.BACKBONE}.body." + ("model." if hasattr(self.body, "model") else "")


def _create_body(config: ModelConfig, img_size: int) -> TimmModel:
    kwargs = {"features_only": True, "in_chans": RGB_CHANNELS} | config.kwargs
    if kwargs["in_chans"] != RGB_CHANNELS:
        raise ConfigError(f"model.kwargs.in_chans must be {RGB_CHANNELS} for RGB images, got {kwargs['in_chans']}")
    source = ModelConfig(config.name, config.pretrained, config.checkpoint, kwargs)
    return create_model_at(source, None, img_size)[0]
