"""A cascade of box heads (Cascade R-CNN), which torchvision lacks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import box_iou, clip_boxes_to_image

from .sampling import BalancedSampler

BETA = 1 / 9  # the smooth L1 loss is quadratic below and linear above, as in torchvision
BACKGROUND, IGNORED = 0, -1
MASK_STEP = 64  # the mask head trains on a multiple of this many boxes

Target = dict[str, Tensor]
Stage = tuple[Tensor, Tensor]


class CascadePredictor(nn.Module):
    """Features (R, in_channels) -> class logits (R, num_classes), background first, and box deltas (R, 4).

    All classes share the deltas. Outputs are fp32 under autocast too: rounding a delta to bf16 would move a box by
    pixels.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> Stage:
        return self.cls_score(x).float(), self.bbox_pred(x).float()


class CascadeRoIHeads(RoIHeads):
    """A cascade of box heads: each stage refines the boxes of the previous one and trains at a higher IoU threshold.

    The first stage trains on a sample of proposals and true boxes, like torchvision's RoIHeads. Each later stage takes
    all boxes of the previous stage, refined, detached and clipped to the image, and matches them at its own threshold.
    Its loss ignores boxes without area. Each stage passes 1 / stages of its gradient to the feature maps. At inference
    the class probabilities are the mean over all stages; the boxes are those of the last stage.

    Args:
        box_roi_pool: feature maps and boxes -> (R, C, 7, 7).
        box_heads: one per stage, (R, C, 7, 7) -> (R, F).
        box_predictors: one per stage, (R, F) -> logits and deltas, like `CascadePredictor`.
        iou_thresholds: one per stage, minimum IoU of a foreground box with a true box.
        bbox_reg_weights: one per stage, weights of its box coder.
        batch_size_per_image, positive_fraction: boxes sampled per image, and maximum share of foreground among them.
        score_thresh, nms_thresh, detections_per_img: as in torchvision.
        mask_roi_pool, mask_head, mask_predictor: as in torchvision. Masks train on the first stage's foreground.

    Raises: ValueError unless there are as many heads as predictors, thresholds and weights.
    Source: Cai & Vasconcelos 2018, arXiv 1712.00726.
    """

    box_head: nn.ModuleList
    box_predictor: nn.ModuleList

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        *,
        iou_thresholds: Sequence[float] = (0.5, 0.6, 0.7),
        bbox_reg_weights: Sequence[tuple[float, float, float, float]] = (
            (10.0, 10.0, 5.0, 5.0),
            (20.0, 20.0, 10.0, 10.0),
            (30.0, 30.0, 15.0, 15.0),
        ),
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
    ):
        counts = [len(each) for each in (box_heads, box_predictors, iou_thresholds, bbox_reg_weights)]
        if len(set(counts)) > 1 or not counts[0]:
            raise ValueError(
                "each stage needs a box head, a predictor, a threshold and weights, got {} heads, {} predictors, "
                "{} thresholds and {} weights".format(*counts)
            )
        super().__init__(
            box_roi_pool,
            nn.ModuleList(box_heads),
            nn.ModuleList(box_predictors),
            iou_thresholds[0],
            iou_thresholds[0],
            batch_size_per_image,
            positive_fraction,
            bbox_reg_weights[0],
            score_thresh,
            nms_thresh,
            detections_per_img,
            mask_roi_pool,
            mask_head,
            mask_predictor,
        )
        self.fg_bg_sampler = BalancedSampler(batch_size_per_image, positive_fraction)
        self.coders = [BoxCoder(weights) for weights in bbox_reg_weights]
        self.box_coder = self.coders[-1]  # decodes the reported boxes
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in iou_thresholds]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Detections and losses, like torchvision's RoIHeads: in training no detections, else no losses."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        boxes, outputs = [p.float() for p in proposals], []
        for k in range(len(self.coders)):
            outputs.append(self._stage(k, features, boxes, image_shapes))
            if k + 1 < len(self.coders):
                boxes = self._refined(k, outputs[k][1], boxes, image_shapes)
        probabilities = torch.stack([logits.softmax(-1) for logits, _ in outputs]).mean(0)
        # torchvision's post-processing takes logits, and deltas per class. softmax(log p) is p.
        deltas = outputs[-1][1].repeat(1, probabilities.shape[1])
        found = self.postprocess_detections(probabilities.log(), deltas, boxes, image_shapes)
        results = [
            dict(zip(("boxes", "scores", "labels"), of_image, strict=True)) for of_image in zip(*found, strict=True)
        ]
        if self.has_mask():
            logits = self._mask_logits(features, [r["boxes"] for r in results], image_shapes)
            masks = maskrcnn_inference(logits, [r["labels"] for r in results])
            results = [r | {"masks": m} for r, m in zip(results, masks, strict=True)]
        return results, {}

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, Tensor]:
        boxes, matched, labels, _ = self.select_training_samples([p.float() for p in proposals], targets)
        first = boxes, matched, labels
        losses = {}
        for k in range(len(self.coders)):
            logits, deltas = self._stage(k, features, boxes, image_shapes)
            found = cascade_loss(logits, deltas, self.coders[k], boxes, matched, labels, targets)
            losses[f"loss_classifier_{k + 1}"], losses[f"loss_box_reg_{k + 1}"] = found
            if k + 1 < len(self.coders):
                boxes = self._refined(k, deltas, boxes, image_shapes)
                matched, labels = self._match(k + 1, boxes, targets)
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, *first, image_shapes, targets)
        return losses

    def _stage(self, k: int, features, boxes: list[Tensor], image_shapes) -> Stage:
        """Class logits and box deltas of stage k for all boxes of all images."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        # Three stages must not send the feature maps three times the gradient of one.
        if self.training and len(self.coders) > 1:
            fixed = pooled.detach()
            # Adds an exact zero; a sum of two weighted parts would round in bf16.
            pooled = fixed + (pooled - fixed) / len(self.coders)
        return self.box_predictor[k](self.box_head[k](pooled))

    def _refined(self, k: int, deltas: Tensor, boxes: list[Tensor], image_shapes) -> list[Tensor]:
        """The boxes after stage k has refined them, clipped to the images."""
        counts = [len(b) for b in boxes]
        moved = self.coders[k].decode_single(deltas.detach(), torch.cat(boxes)).split(counts)
        return [clip_boxes_to_image(b, shape) for b, shape in zip(moved, image_shapes, strict=True)]

    def _match(self, k: int, boxes: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Tensor]]:
        """The index of each box's best true box, and its class at the threshold of stage k.

        Boxes without area are marked as ignored, not removed: cuDNN plans again for every new number of boxes. Mean CPU
        time of a convolution in a training step on an H100:

        | number of boxes | forward | backward |
        |---|---|---|
        | varies | 0.37 ms | 0.74 ms |
        | constant | 0.13 ms | 0.28 ms |
        """
        matched, labels = [], []
        for b, target in zip(boxes, targets, strict=True):
            if len(target["boxes"]) and len(b):  # torchvision's matcher refuses an empty side
                match = self.matchers[k](box_iou(target["boxes"].to(b.dtype), b))
            else:
                match = torch.full((len(b),), Matcher.BELOW_LOW_THRESHOLD, device=b.device)
            matched.append(match.clamp(min=0))
            of_match = target["labels"][matched[-1]] if len(target["boxes"]) else torch.zeros_like(match)
            labels.append(torch.where(match >= 0, of_match, BACKGROUND))
            labels[-1][(b[:, 2:] <= b[:, :2]).any(1)] = IGNORED
        return matched, labels

    def _mask_logits(self, features, boxes: list[Tensor], image_shapes) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()

    def _mask_loss(self, features, boxes, matched, labels, image_shapes, targets) -> Tensor:
        """torchvision's mask loss on the foreground of the first stage.

        Empty boxes pad the batch to a multiple of MASK_STEP; the loss does not see them. Without padding cuDNN plans
        its convolutions for every new number of boxes: 20 of 155 ms per step (4 images of 1024 pixels, H100).
        """
        inside = [of_image > BACKGROUND for of_image in labels]
        boxes = [b[i] for b, i in zip(boxes, inside, strict=True)]
        matched = [m[i] for m, i in zip(matched, inside, strict=True)]
        count = sum(map(len, boxes))
        padding = boxes[-1].new_zeros(max(MASK_STEP, -(-count // MASK_STEP) * MASK_STEP) - count, 4)
        logits = self._mask_logits(features, [*boxes[:-1], torch.cat((boxes[-1], padding))], image_shapes)[:count]
        return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], matched)


def cascade_loss(
    logits: Tensor,
    deltas: Tensor,
    coder: BoxCoder,
    boxes: Sequence[Tensor],
    matched: Sequence[Tensor],
    labels: Sequence[Tensor],
    targets: Sequence[Target],
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all boxes and smooth L1 of the foreground deltas, both averaged over all boxes not ignored.

    Args:
        logits (R, num_classes), deltas (R, 4): predictions for the boxes of all images.
        boxes (R_i, 4): of image i. matched (R_i,): index of each box's true box. labels (R_i,): its class.
    """
    # Masking, unlike indexing, does not synchronise with the GPU.
    all_labels = torch.cat(list(labels))
    count = (all_labels != IGNORED).sum().clamp(min=1)
    classification = F.cross_entropy(logits, all_labels, ignore_index=IGNORED, reduction="sum") / count
    inside = (all_labels > BACKGROUND)[:, None]
    wanted = torch.cat([_encoded(coder, b, m, t["boxes"]) for b, m, t in zip(boxes, matched, targets, strict=True)])
    distance = F.smooth_l1_loss(
        torch.where(inside, deltas, 0), torch.where(inside, wanted, 0), beta=BETA, reduction="sum"
    )
    return classification, distance / count


def _encoded(coder: BoxCoder, boxes: Tensor, matched: Tensor, truth: Tensor) -> Tensor:
    """Deltas (R, 4) from boxes to their true boxes; zeros for an image without true boxes."""
    return coder.encode_single(truth.to(boxes.dtype)[matched], boxes) if len(truth) else torch.zeros_like(boxes)
