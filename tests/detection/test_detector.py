"""Backbones, pyramids and detectors: sizes, strides, layers, positions of boxes, and errors."""

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch.testing import assert_close
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError
from vim.detection import Detector, DetectorConfig
from vim.detection.cascade import CascadePredictor
from vim.detection.pyramid import PyramidBackbone, SimpleFeaturePyramid
from vim.timm_models.config import ModelConfig
from vim.training.graphs import capture_training
from vim.training.optim import OptimConfig, create_optimizer

TINY = {"class_token": "none", "global_pool": "avg", "depth": 3, "embed_dim": 16}
SMALL = {"img_size": 64, "regions": 16}


def detector(kind="faster_rcnn", classes=2, **changes):
    torch.manual_seed(0)
    given = {"name": "vim_nano", "kwargs": TINY, "detector": kind} | SMALL | {"channels": 64 if kind == "fcos" else 32}
    return Detector(DetectorConfig(**given | changes), classes)


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_a_pyramid_from_one_map(stride):
    pyramid = SimpleFeaturePyramid(24, stride, 8)
    maps = pyramid(torch.randn(2, 24, 128 // stride, 128 // stride))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
    assert sum(isinstance(m, torch.nn.ConvTranspose2d) for m in pyramid.modules()) == {4: 0, 8: 1, 16: 3, 32: 6}[stride]
    between = {4: 0, 8: 0, 16: 1, 32: 3}[stride]  # norms and GELUs between transposed convolutions
    assert sum(isinstance(m, LayerNorm2d) for m in pyramid.modules()) == 8 + between
    assert sum(isinstance(m, torch.nn.GELU) for m in pyramid.modules()) == between


BACKBONES = {
    "vim_nano": {"depth": 3},
    "adventurer_tiny": {"depth": 3, "embed_dim": 64},
    "mambar_small": {"depth": 3, "embed_dim": 64},
    "videomamba_tiny": {"depth": 3, "embed_dim": 64},
    "deit_tiny_patch16_224": {"depth": 3},
    "resnet10t": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
}


@pytest.mark.parametrize(("name", "kwargs"), BACKBONES.items())
def test_any_backbone_gives_five_levels_in_fp32(name, kwargs):
    backbone = PyramidBackbone(ModelConfig(name, kwargs=kwargs), 128, 16)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(torch.randn(1, 3, 128, 128))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert [tuple(m.shape) for m in maps.values()] == [(1, 16, 128 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    assert {m.dtype for m in maps.values()} == {torch.float32}
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])
    sum(m.sum() for m in maps.values()).backward()  # DDP needs a gradient for every parameter
    idle = {n for n, p in backbone.named_parameters() if p.grad is None}
    # ViT's class token gets one too: the patches attend to it before it is dropped after the last block.
    assert idle == set()


# Adventurer carries the mean of all patches to the first one, in another corner.
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "adventurer_tiny"])
def test_a_cell_depends_most_on_its_part_of_the_image(name):
    """Changing the upper right corner of the image changes every map most in that corner."""
    torch.manual_seed(0)
    backbone = PyramidBackbone(ModelConfig(name, kwargs=BACKBONES[name]), 128, 16).eval()
    images = torch.randn(2, 3, 128, 128)
    images[1] = images[0]
    images[1, :, :32, 96:].normal_()
    for level, (one, other) in backbone(images).items():
        changed = (one - other).abs().sum(0)
        edge = len(changed) // 4 or 1
        ends = slice(None, edge), slice(-edge, None)
        corners = {(row, column): changed[ends[row], ends[column]].mean() for row in (0, 1) for column in (0, 1)}
        here = corners.pop((0, 1))
        assert here > 2 * max(corners.values()), level


def test_the_plain_map_is_the_last_blocks_without_its_class_token():
    """It is residual plus mixer output, without the final norm."""
    torch.manual_seed(0)
    backbone = PyramidBackbone(ModelConfig("vim_nano", kwargs=TINY), 64, 16)
    body = backbone.body.model
    classifier = timm.create_model("vim_nano", img_size=64, num_classes=0, **TINY)
    classifier.load_state_dict(body.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    want = classifier.blocks(classifier._embed(images)).transpose(1, 2).unflatten(2, (4, 4))
    assert_close(backbone.body(images)[-1], want)


def test_gradients_reach_the_blocks_contiguous():
    """A map that is copied to channels-first sends back strided gradients, which slow down all blocks."""
    backbone = PyramidBackbone(ModelConfig("vim_nano", kwargs=TINY), 64, 16)
    contiguous = []
    for block in backbone.body.model.blocks:
        block.register_full_backward_hook(lambda module, grads, _: contiguous.append(grads[0].is_contiguous()))
    sum(m.sum() for m in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    assert contiguous == [True] * 3


def test_weights_of_a_classifier_with_another_size_and_a_class_token(tmp_path):
    torch.manual_seed(0)
    classifier = timm.create_model("vim_nano", depth=3, embed_dim=16, img_size=32, num_classes=5)
    torch.save({"model": classifier.state_dict()}, tmp_path / "weights.pth")
    body = detector(checkpoint=str(tmp_path / "weights.pth")).body.model
    assert_close(body.blocks.state_dict(), classifier.blocks.state_dict())
    assert body.cls_token is None
    # The position table loses the class token's entry and grows from 2 x 2 to 4 x 4; its mean stays.
    assert body.pos_embed.shape == (1, 16, 16)
    assert_close(body.pos_embed.mean(1), classifier.pos_embed[:, 1:].mean(1), atol=2e-3, rtol=0.1)


def test_layer_decay_and_weight_decay_cover_backbone_and_heads():
    model = detector()
    optimizer = create_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5), 8)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert len(scale) == len(named)
    body = "network.backbone.body.model."
    for name, want in {
        f"{body}pos_embed": 1 / 16,
        f"{body}patch_embed.proj.weight": 1 / 16,
        f"{body}blocks.0.mixer.in_proj.weight": 1 / 8,
        f"{body}blocks.2.mixer.in_proj.weight": 1 / 2,
        "network.backbone.pyramid.levels.0.0.weight": 1,
        "network.roi_heads.box_head.fc6.weight": 1,
    }.items():
        assert scale[id(named[name])] == want, name
    for name in ("pos_embed", "blocks.0.mixer.forward_ssm.A_log", "blocks.1.mixer.backward_ssm.D"):
        assert decay[id(named[body + name])] == 0, name
    assert decay[id(named[f"{body}blocks.0.mixer.in_proj.weight"])] > 0


def test_gradient_checkpointing_keeps_gradients_and_is_graph_safe_for_vim():
    assert detector().graph_safe_checkpointing
    assert not detector(name="deit_tiny_patch16_224", kwargs={"depth": 3}).graph_safe_checkpointing
    images, nothing = [torch.rand(3, 64, 64)], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}]
    gradients = []
    for checkpointing in (False, True):
        model = detector().train()
        if checkpointing:
            model.set_grad_checkpointing()
            assert all(block.grad_checkpointing for block in model.body.model.blocks)
        torch.manual_seed(1)  # of the sampler
        sum(model(images, nothing).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(*gradients)


@pytest.mark.parametrize("name", ["adventurer_tiny", "mambar_small", "videomamba_tiny", "arm_base"])
def test_a_detector_on_each_family_learns(name):
    """With layer decay and gradient checkpointing, on one image of two boxes."""
    model = detector(name=name, kwargs={"depth": 3, "embed_dim": 32})
    model.set_grad_checkpointing()
    assert model.graph_safe_checkpointing
    optimizer = create_optimizer(model, OptimConfig(lr=2e-3, layer_decay=0.8), 8)
    image = torch.rand(3, 64, 64)
    target = {"boxes": torch.tensor([[4.0, 5, 30, 40], [20, 20, 60, 50]]), "labels": torch.tensor([1, 1])}
    history = []
    for _ in range(12):
        losses = model.train()([image], [target])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0], history


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [value for part in (output.values() if isinstance(output, dict) else output) for value in tensors(part)]


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "fcos"])
def test_losses_and_detections_of_every_detector(kind):
    """A batch of images of several sizes, one without boxes. The box heads' outputs are fp32 under autocast."""
    model, said = detector(kind, score_threshold=0.0), []
    parts = [m for m in model.modules() if isinstance(m, RPNHead | FastRCNNPredictor | CascadePredictor | FCOSHead)]
    for part in parts:
        part.register_forward_hook(lambda module, args, output: said.extend(tensors(output)))
    sizes = [(64, 64), (40, 64), (50, 33)]
    images = [torch.rand(3, *size) for size in sizes]
    targets = [
        {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}
        for boxes in (
            torch.tensor([[4.0, 5, 30, 40], [20, 20, 60, 50]]),
            torch.zeros(0, 4),
            torch.tensor([[1.0, 1, 20, 30]]),
        )
    ]
    for target, size in zip(targets, sizes, strict=True):
        target["masks"] = torch.ones(len(target["boxes"]), *size, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert len(parts) == {"fcos": 1, "cascade_rcnn": 4, "cascade_mask_rcnn": 4}.get(kind, 2)
    assert {value.dtype for value in said} == {torch.float32}
    sum(losses.values()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    large = [torch.rand(3, 100, 300), torch.rand(3, 21, 7)]
    with torch.no_grad():
        found = model.eval()(large)
    for image, detected in zip(large, found, strict=True):
        height, width = image.shape[-2:]
        assert (detected["boxes"] >= 0).all()
        assert (detected["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert ("masks" in detected) == ("mask" in kind)
        if "mask" in kind:
            assert detected["masks"].shape == (len(detected["boxes"]), 1, height, width)


@pytest.mark.parametrize(("kind", "factor", "ratios"), [("cascade_rcnn", 8, (0.5, 1, 2)), ("fcos", 1, (1,))])
def test_every_cell_has_anchors_of_the_size_of_its_level(kind, factor, ratios):
    network = detector(kind).network
    generator = network.anchor_generator if kind == "fcos" else network.rpn.anchor_generator
    strides = (4, 8, 16, 32, 64)
    maps = [torch.zeros(1, 1, 128 // stride, 128 // stride) for stride in strides]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)]), maps)
    for stride, level in zip(strides, anchors.split([len(ratios) * (128 // s) ** 2 for s in strides]), strict=True):
        width, height = (level[: len(ratios), 2:] - level[: len(ratios), :2]).T
        assert_close(height / width, torch.tensor(ratios).float(), atol=0, rtol=0.1)
        assert_close((width * height).sqrt(), torch.full((len(ratios),), factor * stride).float(), atol=0, rtol=0.06)
        centres = (level[:, :2] + level[:, 2:])[:: len(ratios)] / 2
        places = torch.arange(0, 128, stride).float()
        assert_close(centres, torch.cartesian_prod(places, places).flip(1))


def test_stages_of_the_cascade_share_no_parameter():
    heads = detector("cascade_rcnn").network.roi_heads
    for parts in (heads.box_head, heads.box_predictor):
        assert len({id(p) for part in parts for p in part.parameters()}) == 3 * len(list(parts[0].parameters()))


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_regions_are_pooled_from_the_map_of_their_size_with_four_samples_per_cell(kind):
    """Averaged over four samples per cell, stripes of 0 and 1 give 1/2."""
    heads = detector(kind).network.roi_heads
    shape = [(512, 512)]
    for pool, size in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
        levels = {str(i): torch.full((1, 1, 128 >> i, 128 >> i), float(i)) for i in range(4)}
        regions = torch.tensor([[0.0, 0, edge, edge] for edge in (20, 100, 120, 220, 230, 440, 450, 500)])
        pooled = pool(levels, [regions], shape)
        assert pooled.shape == (8, 1, size, size)
        assert pooled.mean((1, 2, 3)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        levels["0"] += torch.arange(128) % 2
        pooled = pool(levels, [torch.tensor([[0.0, 8, 2 * 4 * size, 36]])], shape)
        assert_close(pooled, torch.full_like(pooled, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fcos", "cascade_mask_rcnn"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_backbone_gives_the_losses_and_gradients_of_an_eager_one(kind, checkpointing):
    torch.manual_seed(1)
    images = [torch.rand(3, 64, 64, device="cuda") for _ in range(2)]
    boxes = torch.tensor([[4.0, 5, 30, 40], [20, 20, 60, 50]], device="cuda")
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2], device="cuda"),
        "masks": torch.ones(2, 64, 64).byte().cuda(),
    }
    found = []
    for captured in (False, True):
        model = detector(kind).cuda().train()
        if checkpointing:
            model.set_grad_checkpointing()
        if captured:
            capture_training(model.network.backbone, torch.zeros(2, 3, 64, 64, device="cuda"), None)
        for seed in range(2):  # the second step replays the graph with other random numbers and the same weights
            torch.manual_seed(seed)
            model.zero_grad()
            losses = model(images, [target] * 2)
            sum(losses.values()).backward()
        found.append((losses, {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (128, 96), (200, 50), (17, 31)])
def test_boxes_are_in_pixels_of_the_input_image(size, monkeypatch):
    """A fake head reports the unpadded part of the square as a box; in the input image this is the whole image."""
    model = detector().eval()
    seen = {}

    def heads(features, proposals, shapes, targets=None):
        seen["shapes"] = shapes
        box = torch.tensor([[0.0, 0, shapes[0][1], shapes[0][0]]])
        return [{"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([1.0])}], {}

    monkeypatch.setattr(model.network.roi_heads, "forward", heads)
    boxes = model([torch.rand(3, *size)])[0]["boxes"]
    assert max(seen["shapes"][0]) == 64
    assert_close(boxes, torch.tensor([[0.0, 0, size[1], size[0]]]))


def test_downscaling_is_antialiased_and_padding_is_zero():
    """A black and white checkerboard, four times as large as the square, turns grey when it is scaled down."""
    transform = detector().eval().network.transform
    grid = (torch.arange(256)[:, None] + torch.arange(128)) % 2
    images, _ = transform([grid.float().expand(3, 256, 128)])
    assert images.tensors.shape == (1, 3, 64, 64)
    mean, std = torch.tensor(transform.image_mean), torch.tensor(transform.image_std)
    inside = images.tensors[0, :, 2:-2, 2:30].flatten(1)
    assert_close(inside, ((0.5 - mean) / std)[:, None].expand_as(inside), atol=0.02, rtol=0)
    assert (images.tensors[..., 32:] == 0).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"model.img_size must be a multiple of 64 pixels, got 100"):
        DetectorConfig(img_size=100)
    with pytest.raises(ValueError, match=r"set model.img_size"):
        DetectorConfig(kwargs={"img_size": 64})
    with pytest.raises(ConfigError, match=r"no model 'vim_nona' .*did you mean"):
        detector(name="vim_nona", kwargs={})
    with pytest.raises(ConfigError, match=r"has a map of stride 14, a pyramid needs one of \(4, 8, 16, 32\)"):
        detector(name="vit_small_patch14_dinov2", kwargs={"depth": 3})
    with pytest.raises(ConfigError, match=r"vim_nano has 7 x 7 patches in 64 pixels, .*every 8 pixels .*not overlap"):
        detector(kwargs=TINY | {"patch_stride": 8})
    with pytest.raises(ConfigError, match=r"cannot make vim_nano with .*: .*out of range"):
        detector(kwargs=TINY | {"depth": 2})
    with pytest.raises(ValueError, match=r"model.channels must be a multiple of 32 for fcos, got 16"):
        DetectorConfig(detector="fcos", channels=16)
    with pytest.raises(
        ValueError, match=r"model.channels must be at least 64 for fcos at img_size 64, .*; got 32, take 64"
    ):
        DetectorConfig(detector="fcos", channels=32, img_size=64)
    with pytest.raises(ConfigError, match=r"resnet10t has no layer groups as a backbone"):
        create_optimizer(detector(name="resnet10t", kwargs={}), OptimConfig(layer_decay=0.9), 8)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"training images must fit into 64 pixels, got 65 x 20"):
        detector().train()([torch.rand(3, 65, 20)], [nothing])
