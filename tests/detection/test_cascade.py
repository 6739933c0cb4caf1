"""The cascade: one stage against torchvision's box head, hand-computed cases, properties of three stages."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from vim.detection.cascade import CascadePredictor, CascadeRoIHeads, cascade_loss

CHANNELS, WIDTH, SIZE = 4, 8, 64
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


def pool(size=7):
    return MultiScaleRoIAlign(["0"], size, sampling_ratio=2)


def mask_parts(classes):
    return {
        "mask_roi_pool": pool(14),
        "mask_head": MaskRCNNHeads(CHANNELS, [CHANNELS], 1),
        "mask_predictor": MaskRCNNPredictor(CHANNELS, CHANNELS, classes),
    }


def cascade(stages=3, classes=3, masks=False, **options):
    torch.manual_seed(0)
    return CascadeRoIHeads(
        pool(),
        [TwoMLPHead(CHANNELS * 49, WIDTH) for _ in range(stages)],
        [CascadePredictor(WIDTH, classes) for _ in range(stages)],
        **({} if stages == 3 else {"iou_thresholds": (0.5, 0.6)[:stages], "bbox_reg_weights": WEIGHTS[:stages]}),
        **options,
        **(mask_parts(classes) if masks else {}),
    )


def boxes(count, seed=0):
    corners = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) * 40
    corners[:, 2:] = corners[:, :2] + 6 + corners[:, 2:] / 2
    return corners.clamp(max=SIZE)


def scene(images=2, true_boxes=(3, 2), classes=3, masks=False):
    """Feature maps, proposals (near the true boxes and elsewhere), image sizes and targets."""
    torch.manual_seed(1)
    features = {"0": torch.randn(images, CHANNELS, SIZE // 4, SIZE // 4, requires_grad=True)}
    targets, proposals = [], []
    for image, count in enumerate(true_boxes):
        truth = boxes(count, seed=image)
        target = {"boxes": truth, "labels": torch.randint(1, classes, (count,))}
        if masks:
            target["masks"] = torch.randint(0, 2, (count, SIZE, SIZE), dtype=torch.uint8)
        targets.append(target)
        proposals.append(torch.cat([(truth + torch.randn(count, 4)).clamp(0, SIZE), boxes(20, seed=10 + image)]))
    return features, proposals, [(SIZE, SIZE)] * images, targets


@pytest.mark.parametrize("masks", [False, True])
def test_one_stage_is_torchvisions_head(masks):
    mine = cascade(stages=1, classes=2, masks=masks, score_thresh=0.0)
    parts = mask_parts(2) if masks else {}
    theirs = RoIHeads(
        pool(), TwoMLPHead(CHANNELS * 49, WIDTH), FastRCNNPredictor(WIDTH, 2), 0.5, 0.5, 512, 0.25, None, 0.0, 0.5, 100,
        **parts,
    )  # fmt: skip
    theirs.box_head.load_state_dict(mine.box_head[0].state_dict())
    score, delta = mine.box_predictor[0].cls_score, mine.box_predictor[0].bbox_pred
    with torch.no_grad():
        theirs.box_predictor.cls_score.load_state_dict(score.state_dict())
        theirs.box_predictor.bbox_pred.weight.copy_(delta.weight.repeat(2, 1))
        theirs.box_predictor.bbox_pred.bias.copy_(delta.bias.repeat(2))
    for name in parts:
        getattr(theirs, name).load_state_dict(getattr(mine, name).state_dict())
    found = []
    for heads in (mine, theirs):
        features, proposals, shapes, targets = scene(classes=2, masks=masks)
        torch.manual_seed(5)  # of the sampler
        losses = heads.train()(features, proposals, shapes, targets)[1]
        sum(losses.values()).backward()
        detections = heads.eval()({"0": features["0"].detach()}, proposals, shapes)[0]
        found.append((list(losses.values()), features["0"].grad, detections))
    (my_losses, my_gradient, my_detections), (losses, gradient, detections) = found
    assert len(losses) == 2 + masks
    assert_close(my_losses, losses)
    assert_close(my_gradient, gradient)
    assert len(detections[0]["boxes"]) > 5
    for one, other in zip(my_detections, detections, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("true_boxes", [(3, 2), (3, 0), (0, 0)])
def test_padding_the_mask_heads_batch_changes_nothing(true_boxes, monkeypatch):
    found, counts = [], []
    for step in (1, 64):
        monkeypatch.setattr("vim.detection.cascade.MASK_STEP", step)
        heads = cascade(masks=True).train()
        heads.mask_head.register_forward_hook(lambda module, args, output: counts.append(len(output)))
        features, proposals, shapes, targets = scene(true_boxes=true_boxes, masks=True)
        torch.manual_seed(5)  # of the sampler
        losses = heads(features, proposals, shapes, targets)[1]
        sum(losses.values()).backward()
        found.append((losses, features["0"].grad, [p.grad for p in heads.parameters()]))
    assert_close(*found)
    assert counts[1] == 64
    assert 1 <= counts[0] < 64


def test_each_stage_matches_at_its_own_threshold():
    """Boxes with IoU 0.45, 0.55, 0.65 and 0.75 to a true box of 10 x 10."""
    heads = cascade()
    target = {"boxes": torch.tensor([[40.0, 40, 50, 50], [0.0, 0, 10, 10]]), "labels": torch.tensor([1, 2])}
    candidates = torch.tensor([[0.0, 0, 10 * iou, 10] for iou in (0.45, 0.55, 0.65, 0.75)])
    for stage, want in enumerate(([0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2])):
        matched, labels = heads._match(stage, [candidates], [target])
        assert labels[0].tolist() == want
        assert matched[0][labels[0] > 0].eq(1).all()
    lost = torch.tensor([[0.0, 5, 0, 9], [3.0, 7, 9, 7]])  # no area
    assert heads._match(0, [lost], [target])[1][0].tolist() == [-1, -1]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert heads._match(1, [candidates], [nothing])[1][0].tolist() == [0, 0, 0, 0]
    assert heads._match(1, [candidates[:0]], [target])[1][0].tolist() == []


@pytest.mark.parametrize("stage", range(3))
def test_loss_by_hand(stage):
    """Three boxes: one of class 2 whose true box is moved by (1, -2) and scaled by (1.5, 0.5), one background box, and
    one ignored box."""
    coder = cascade().coders[stage]
    box = torch.tensor([[10.0, 20, 20, 40], [0.0, 0, 5, 5], [3.0, 3, 3, 9]])  # width 10, height 20, centre (15, 30)
    truth = torch.tensor([[8.5, 23, 23.5, 33]])  # width 15, height 10, centre (16, 28)
    logits = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5], [5.0, 4.0, 3.0]])
    deltas = torch.tensor([[0.3, -0.1, 0.2, 0.01], [9.0, 9, 9, 9], [9.0, 9, 9, 9]])
    target = {"boxes": truth, "labels": torch.tensor([2])}
    found = cascade_loss(logits, deltas, coder, [box], [torch.tensor([0, 0, 0])], [torch.tensor([2, 0, -1])], [target])
    want_class = 0.0
    for row, label in zip(logits[:2].tolist(), (2, 0), strict=True):
        want_class += math.log(sum(map(math.exp, row))) - row[label]
    exact = [1 / 10, -2 / 20, math.log(1.5), math.log(0.5)]
    want_box = 0.0
    for delta, value, weight in zip(deltas[0].tolist(), exact, WEIGHTS[stage], strict=True):
        distance = abs(delta - weight * value)
        want_box += 0.5 * distance**2 * 9 if distance < 1 / 9 else distance - 1 / 18
    assert [loss.item() for loss in found] == pytest.approx([want_class / 2, want_box / 2], rel=1e-5)


def test_each_stage_trains_at_its_own_threshold_and_masks_at_the_first():
    """Constant predictions: probability 3/4 for the class, zero deltas, mask logit 2. The true box is 10 x 10 and its
    left half is the object. Proposals cover its left 55, 65 and 75 %, so 4, 3 and 2 of the 4 boxes are foreground."""
    heads = cascade(classes=2, masks=True).train()
    with torch.no_grad():
        for predictor in heads.box_predictor:
            for parameter in predictor.parameters():
                parameter.zero_()
            predictor.cls_score.bias[1] = math.log(3)
        heads.mask_predictor.mask_fcn_logits.weight.zero_()
        heads.mask_predictor.mask_fcn_logits.bias.fill_(2.0)
    overlaps = [0.55, 0.65, 0.75, 1.0]  # the true box is added to the proposals
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    mask[..., :15] = 1
    target = {"boxes": torch.tensor([[10.0, 10, 20, 20]]), "labels": torch.tensor([1]), "masks": mask}
    proposals = torch.tensor([[10.0, 10, 10 + 10 * iou, 20] for iou in overlaps[:3]])
    losses = heads({"0": torch.randn(1, CHANNELS, 16, 16)}, [proposals], [(SIZE, SIZE)], [target])[1]
    want = {}
    for stage, (x, _, w, _) in enumerate(WEIGHTS, 1):
        inside = overlaps[stage - 1 :]
        want[f"loss_classifier_{stage}"] = (len(inside) * math.log(4 / 3) + (4 - len(inside)) * math.log(4)) / 4
        distances = [d for iou in inside for d in (x * (1 / iou - 1) / 2, -w * math.log(iou))]
        want[f"loss_box_reg_{stage}"] = sum(d - 1 / 18 for d in distances if d) / 4
    object_share = sum(0.45 / iou for iou in overlaps) / 4  # roi_align shifts pixels by half a pixel to the left
    mask_loss = losses.pop("loss_mask").item()
    assert mask_loss == pytest.approx(math.log(1 + math.exp(2)) - 2 * object_share, abs=0.02)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(want, rel=1e-5)


def test_refined_boxes_are_detached_and_clipped(monkeypatch):
    """Stage one moves boxes left by their width and down by their height, in images of two sizes."""
    heads = cascade(stages=2).train()
    features, proposals, _, targets = scene()
    shapes = [(48, SIZE), (40, SIZE)]
    with torch.no_grad():
        heads.box_predictor[0].bbox_pred.weight.zero_()
        heads.box_predictor[0].bbox_pred.bias.copy_(torch.tensor([-10.0, 10, 0, 0]))
    seen = []
    stage = heads._stage
    monkeypatch.setattr(heads, "_stage", lambda k, f, b, s: (seen.append(b), stage(k, f, b, s))[1])
    heads(features, proposals, shapes, targets)
    for before, after, (height, width) in zip(*seen, shapes, strict=True):
        widths, heights = (before[:, 2:] - before[:, :2]).unbind(1)
        moved = before + torch.stack([-widths, heights] * 2, 1)
        assert (moved[:, 0] < 0).any()
        assert (moved[:, 3] > 48).any()
        ends = torch.tensor([width, height] * 2)
        assert_close(after, moved.clamp(min=0).minimum(ends), atol=1e-4, rtol=1e-5)
        assert not after.requires_grad


def test_three_equal_stages_give_the_features_the_gradient_of_one():
    """Three stages with equal weights and thresholds and zero deltas: each passes on a third of its gradient."""
    one = cascade(stages=1)
    three = cascade()
    three.coders, three.matchers = one.coders * 3, one.matchers * 3
    with torch.no_grad():
        one.box_predictor[0].bbox_pred.weight.zero_()
        one.box_predictor[0].bbox_pred.bias.zero_()
    for k in range(3):
        three.box_head[k].load_state_dict(one.box_head[0].state_dict())
        three.box_predictor[k].load_state_dict(one.box_predictor[0].state_dict())
    gradients = []
    for heads in (one, three):
        features, proposals, shapes, targets = scene()
        torch.manual_seed(5)
        sum(heads.train()(features, proposals, shapes, targets)[1].values()).backward()
        gradients.append((features["0"].grad, heads.box_head[-1].fc6.weight.grad))
    assert_close(gradients[1][0], gradients[0][0], atol=1e-6, rtol=1e-4)
    assert_close(gradients[1][1], gradients[0][1], atol=1e-6, rtol=1e-4)  # the heads get the whole gradient


def test_scores_are_the_mean_of_the_stages():
    heads = cascade(score_thresh=0.0).eval()
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 1.0]])
    with torch.no_grad():
        for k in range(3):
            heads.box_predictor[k].cls_score.weight.zero_()
            heads.box_predictor[k].cls_score.bias.copy_(logits[k])
            heads.box_predictor[k].bbox_pred.weight.zero_()
            heads.box_predictor[k].bbox_pred.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    features, _, shapes, _ = scene(images=1, true_boxes=(1,))
    proposal = torch.tensor([[8.0, 8, 18, 28]])
    found = heads(features, [proposal], shapes)[0][0]
    want = sum(row.softmax(0) for row in logits) / 3
    assert_close(found["scores"], want[1:].sort(descending=True).values)
    assert found["labels"].tolist() == [1, 2]
    shift = 10 * (1 / 10 + 1 / 20 + 1 / 30)  # a delta of 1 in each stage, divided by its weight, times the width 10
    assert_close(found["boxes"], (proposal + torch.tensor([shift, 0, shift, 0])).expand(2, 4))


@pytest.mark.parametrize("true_boxes", [(0, 0), (0, 3)])
def test_images_without_boxes_train_the_background(true_boxes):
    heads = cascade(masks=True).train()
    features, proposals, shapes, targets = scene(true_boxes=true_boxes, masks=True)
    losses = heads(features, proposals, shapes, targets)[1]
    assert len(losses) == 7
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_images_without_proposals():
    heads = cascade(masks=True)
    features, _, shapes, _ = scene()
    nothing = [torch.zeros(0, 4)] * 2
    empty = {"boxes": nothing[0], "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, SIZE, SIZE)}
    losses = heads.train()(features, nothing, shapes, [empty, empty])[1]
    assert all(loss == 0 for loss in losses.values())
    found = heads.eval()(features, nothing, shapes)[0]
    assert [len(f["boxes"]) for f in found] == [0, 0]
    assert found[0]["masks"].shape == (0, 1, 28, 28)


def test_boxes_keep_their_precision_under_autocast(monkeypatch):
    heads = cascade(score_thresh=0.0, masks=True)
    features, proposals, shapes, targets = scene(masks=True)
    features = {"0": features["0"].bfloat16()}
    proposals = [p.bfloat16() for p in proposals]
    seen = []
    stage = heads._stage
    monkeypatch.setattr(heads, "_stage", lambda k, f, b, s: (seen.extend(b), stage(k, f, b, s))[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in CascadePredictor(WIDTH, 2)(torch.randn(3, WIDTH))] == [torch.float32] * 2
        losses = heads.train()(features, proposals, shapes, targets)[1]
        found = heads.eval()(features, proposals, shapes)[0]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(b.dtype == torch.float32 for b in seen)
    assert {value.dtype for name, value in found[0].items() if name != "labels"} == {torch.float32}


def test_scaling_the_gradient_keeps_the_values():
    """In bf16, x / 3 + 2 * x / 3 is not always x."""
    heads, seen = cascade().train(), []
    heads.box_roi_pool.forward = lambda features, boxes, shapes: features["0"]
    heads.box_head[0].forward = lambda x: (seen.append(x), torch.zeros(len(x), WIDTH))[1]
    x = torch.randn(64, CHANNELS, 7, 7).bfloat16().requires_grad_()
    heads._stage(0, {"0": x}, [], [])
    assert torch.equal(seen[0], x)
    assert_close(torch.autograd.grad(seen[0].float().sum(), x)[0], torch.full_like(x, 1 / 3))


def test_stages_must_be_complete():
    with pytest.raises(ValueError, match=r"got 1 heads, 1 predictors, 3 thresholds and 3 weights"):
        CascadeRoIHeads(nn.Identity(), [nn.Identity()], [nn.Identity()])
