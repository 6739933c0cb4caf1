"""Detectors on the feature maps of any timm model: torchvision's, and a three-stage cascade."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from vim.timm_models.config import ModelConfig

from .cascade import CascadePredictor, CascadeRoIHeads
from .pyramid import LEVELS, STRIDES, OnBackbone, PyramidBackbone
from .sampling import BalancedSampler

BOX_POOL, MASK_POOL = 7, 14  # edge of a pooled region, in cells
STAGES = 3
SIZE_STEP = 64  # stride of the pyramid's top level, in pixels

Heads = Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "fcos"]


@dataclass
class DetectorConfig(ModelConfig):
    """The detector. name, pretrained, checkpoint and kwargs are for its backbone, any timm model."""

    detector: Heads = "cascade_mask_rcnn"
    """Heads: faster_rcnn, mask_rcnn or fcos of torchvision; cascade_rcnn or cascade_mask_rcnn with three stages."""
    img_size: int = 1024
    """Edge of the square input in pixels, a multiple of 64; images are scaled to fit and padded."""
    channels: int = 256
    """Channels of each pyramid level and of the heads' convolutions; fully connected layers have four times as many."""
    regions: int = 512
    """Regions per image on which the box heads train."""
    score_threshold: float = 0.05
    """Minimum score of a reported box, 0..1."""
    nms_threshold: float = 0.5
    """Non-maximum suppression drops the worse of two boxes of a class if their IoU is above this, 0..1."""
    max_boxes: int = 100
    """Maximum number of reported boxes per image; COCO's average precision counts 100."""

    def __post_init__(self):
        super().__post_init__()
        if self.img_size < SIZE_STEP or self.img_size % SIZE_STEP:
            raise ValueError(f"model.img_size must be a multiple of {SIZE_STEP} pixels, got {self.img_size}")
        if "img_size" in self.kwargs:
            raise ValueError("model.kwargs.img_size would resize the backbone alone; set model.img_size")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("channels", "regions", "max_boxes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.detector == "fcos" and self.channels % 32:  # the group norm of torchvision's heads has 32 groups
            raise ValueError(f"model.channels must be a multiple of 32 for fcos, got {self.channels}")
        if self.detector == "fcos" and self.channels == 32 and self.img_size == SIZE_STEP:
            # The top level is one cell and each group one channel. Group norm refuses a single value, and turns
            # values of several images into constants.
            raise ValueError(
                "model.channels must be at least 64 for fcos at img_size 64, or its group norm would see single "
                "values; got 32, take 64 or a larger img_size"
            )

    @property
    def masks(self) -> bool:
        return "mask" in self.detector


class Detector(OnBackbone):
    """Images in, losses or detections out.

    Args:
        config: of detector and backbone.
        num_classes: without the background.

    Raises: ConfigError for a backbone that does not fit.
    """

    BACKBONE = "network.backbone"

    def __init__(self, config: DetectorConfig, num_classes: int):
        super().__init__()
        backbone = PyramidBackbone(config, config.img_size, config.channels)
        self.name = config.name
        self.loaded_weights = backbone.body.loaded_weights  # of the backbone; the rest starts at random
        self.network = _NETWORKS[config.detector](backbone, config, num_classes)
        cfg = backbone.body.pretrained_cfg
        self.network.transform = _FitSquare(config.img_size, cfg["mean"], cfg["std"])

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training mode, detections in evaluation mode.

        Args:
            images: (3, H, W) each, 0..1; of any size in evaluation mode, no larger than the square in training.
            targets: boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 1 up and, for masks, masks (n, H, W).

        Returns: in evaluation mode, for each image: boxes, labels, scores (n,) in descending order and, for masks,
            masks (n, 1, H, W), 0..1, in pixels of the input image.
        """
        return self.network(images, targets)


class _FitSquare(GeneralizedRCNNTransform):
    """Normalise, scale to fit into a square, and pad to it on the right and at the bottom.

    Training images already fit and are not scaled. Unlike torchvision's transform, this one scales with antialiasing.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(size, size, list(mean), list(std), size_divisible=size)
        self.size = size
        # As buffers: torchvision builds tensors from them for each image, which synchronises with the GPU.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None):
        height, width = image.shape[-2:]
        if self.training:
            if max(height, width) > self.size:
                raise ValueError(f"training images must fit into {self.size} pixels, got {height} x {width}")
            return image, target
        scale = self.size / max(height, width)
        size = [max(1, round(edge * scale)) for edge in (height, width)]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target


# The outputs of all box heads are fp32 under autocast too: rounding a delta to bf16 would move a box by pixels.


class _RegionHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class _PointHead(FCOSHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        found = {name: value.float() for name, value in super().forward(x).items()}
        if not self.training:
            # torchvision's FCOS has an output for the background and would report it like any other class.
            found["cls_logits"][..., 0] = -math.inf
        return found


def _pool(size: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(list(LEVELS), size, sampling_ratio=2)


def _mask_parts(channels: int, num_classes: int) -> dict[str, Any]:
    return {
        "mask_roi_pool": _pool(MASK_POOL),
        "mask_head": MaskRCNNHeads(channels, [channels] * 4, 1, LayerNorm2d),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
    }


def _two_stages(backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> FasterRCNN:
    """Region proposals and a box head, with a mask head if the config has masks."""
    channels = backbone.out_channels
    anchors = AnchorGenerator(
        tuple((8 * stride,) for stride in (*STRIDES, 2 * STRIDES[-1])), ((0.5, 1.0, 2.0),) * (len(STRIDES) + 1)
    )
    network = (MaskRCNN if config.masks else FasterRCNN)(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=_RegionHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        # torchvision keeps 2,000 per level before suppression, which then took 15 % of the GPU time of a training step
        # (Vim-Ti, mask cascade, batch 4 at 1024 pixels, H100).
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=_pool(BOX_POOL),
        box_head=TwoMLPHead(channels * BOX_POOL**2, 4 * channels),
        box_predictor=_BoxPredictor(4 * channels, num_classes + 1),
        box_batch_size_per_image=config.regions,
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_threshold,
        box_detections_per_img=config.max_boxes,
        **(_mask_parts(channels, num_classes) if config.masks else {}),
    )
    for part in (network.rpn, network.roi_heads):
        theirs = part.fg_bg_sampler
        part.fg_bg_sampler = BalancedSampler(theirs.batch_size_per_image, theirs.positive_fraction)
    return network


def _cascade(backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> FasterRCNN:
    network = _two_stages(backbone, config, num_classes)
    channels = backbone.out_channels
    size, convolutions = (channels, BOX_POOL, BOX_POOL), [channels] * 4
    heads = [FastRCNNConvFCHead(size, convolutions, [4 * channels], LayerNorm2d) for _ in range(STAGES)]
    network.roi_heads = CascadeRoIHeads(
        _pool(BOX_POOL),
        heads,
        [CascadePredictor(4 * channels, num_classes + 1) for _ in range(STAGES)],
        batch_size_per_image=config.regions,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.max_boxes,
        **(_mask_parts(channels, num_classes) if config.masks else {}),
    )
    return network


def _one_stage(backbone: PyramidBackbone, config: DetectorConfig, num_classes: int) -> FCOS:
    strides = (*STRIDES, 2 * STRIDES[-1])
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    return FCOS(
        backbone,
        num_classes + 1,
        anchor_generator=anchors,
        head=_PointHead(backbone.out_channels, anchors.num_anchors_per_location()[0], num_classes + 1),
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.max_boxes,
    )


_NETWORKS: dict[str, Callable[..., Any]] = {
    "faster_rcnn": _two_stages,
    "mask_rcnn": _two_stages,
    "cascade_rcnn": _cascade,
    "cascade_mask_rcnn": _cascade,
    "fcos": _one_stage,
}
