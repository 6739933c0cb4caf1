"""Detectors: torchvision's, and the cascade, on the feature maps of any timm model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

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

from .cascade import CascadePredictor, CascadeRoIHeads
from .config import DetectorConfig
from .pyramid import LEVELS, STRIDES, OnBackbone, PyramidBackbone
from .sampling import BalancedSampler

BOX_POOL, MASK_POOL = 7, 14  # cells of a pooled region
STAGES = 3


class Detector(OnBackbone):
    """Images in, losses or detections out.

    Args:
        config: of detector and backbone. num_classes: without the background.

    Raises: ConfigError for a backbone that does not fit.
    """

    BACKBONE = "network.backbone"

    def __init__(self, config: DetectorConfig, num_classes: int):
        super().__init__()
        backbone = PyramidBackbone(config, config.img_size, config.channels)
        self.name = config.name
        self.loaded_weights = backbone.body.loaded_weights  # of the backbone's weights; the rest is new
        self.network = _NETWORKS[config.detector](backbone, config, num_classes)
        cfg = backbone.body.pretrained_cfg
        self.network.transform = _FitSquare(config.img_size, cfg["mean"], cfg["std"])

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Training: losses by name, of images that fit into the square. Else: detections of images of any sizes.

        Args:
            images: (3, H, W) each, 0..1.
            targets: boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 1 up and, for masks, masks (n, H, W).

        Returns: in evaluation mode, for each image boxes, labels, scores (n,) falling, and masks (n, 1, H, W), 0..1,
            in pixels of the image as it was given.
        """
        return self.network(images, targets)


class _FitSquare(GeneralizedRCNNTransform):
    """Normalise; scale to fit into a square (not in training, whose images fit already); pad to it, right and below.

    torchvision's own scales without a filter: what shrinks turns to noise.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(size, size, list(mean), list(std), size_divisible=size)
        self.size = size
        # torchvision makes tensors of them for each image, and waits until the GPU has them.
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


# Box deltas of low precision would move a box by pixels: what heads say of boxes is fp32 under autocast too.


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
            # torchvision has a class for the background too, and would report it like any other.
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
    """Region proposals and a box head, with masks if wanted."""
    channels = backbone.out_channels
    anchors = AnchorGenerator(
        tuple((8 * stride,) for stride in (*STRIDES, 2 * STRIDES[-1])), ((0.5, 1.0, 2.0),) * (len(STRIDES) + 1)
    )
    network = (MaskRCNN if config.masks else FasterRCNN)(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=_RegionHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        # torchvision takes 2,000 of each level into the suppression: 15 % of the GPU's time in a step of Vim-Ti with
        # the mask cascade, batch 4 at 1024 pixels on an H100.
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
        drawn = part.fg_bg_sampler
        part.fg_bg_sampler = BalancedSampler(drawn.batch_size_per_image, drawn.positive_fraction)
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
