"""VisionMamba: the effect of each option, and what stays after a change of size, head or depth."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.testing import assert_close

from vim.models.patch_embed import PatchEmbed
from vim.models.vision_mamba import VARIANTS, VisionMamba, checkpoint_filter_fn

TINY = {"img_size": (24, 16), "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}
PLACES = {
    "middle": {"class_token": "middle"},
    "first": {"class_token": "first"},
    "both": {"class_token": "both"},
    "none": {"class_token": "none", "global_pool": "avg"},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**options) -> VisionMamba:
    """A model with random offsets on all parameters: a bias of 0 would hide errors."""
    model = VisionMamba(**TINY | options)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


# Sizes


def by_set_input_size(model, options, path):
    model.set_input_size((16, 28))
    return model


def by_dynamic_size(model, options, path):
    other = VisionMamba(**TINY, **options, dynamic_img_size=True)
    other.load_state_dict(model.state_dict())
    return other


def by_filter(model, options, path):
    other = VisionMamba(**TINY | {"img_size": (16, 28)}, **options)
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    return other


def by_checkpoint(model, options, path):
    torch.save({"state_dict": model.state_dict()}, path / "weights.pth")
    other = VisionMamba(**TINY | {"img_size": (16, 28)}, **options)
    load_checkpoint(other, str(path / "weights.pth"), filter_fn=checkpoint_filter_fn)
    return other


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("resize", [by_set_input_size, by_dynamic_size, by_filter, by_checkpoint])
def test_another_size_resamples_the_patches_and_keeps_the_class_entries(resize, options, tmp_path):
    """From 6 x 4 to 4 x 7 patches; equals a model of that size with a table resampled by hand."""
    model = tiny(**options)
    prefix = model.num_prefix_tokens
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    entries, patches = weights["pos_embed"].split([prefix, 24], 1)
    grid = patches.unflatten(1, (6, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 7), mode="bicubic", antialias=True, align_corners=False)
    weights |= {
        "pos_embed": torch.cat((entries, grid.flatten(2).mT), 1),
        "pos_embed_grid": torch.tensor([4, 7]),
    }
    want = VisionMamba(**TINY | {"img_size": (16, 28)}, **options).eval()
    want.load_state_dict(weights)
    x = torch.randn(1, 1, 16, 28)
    assert_close(resize(model, options, tmp_path).eval()(x), want(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("learns", [True, False])
def test_what_is_frozen_stays_frozen_at_another_size(learns):
    model = tiny()
    model.pos_embed.requires_grad_(learns)
    model.patch_embed.proj.weight.requires_grad_(learns)
    model.set_input_size((24, 24), patch_size=6)
    assert model.pos_embed.shape == (1, 1 + 16, 16)
    assert model.patch_embed.proj.weight.shape == (16, 1, 6, 6)
    assert model.pos_embed.requires_grad is learns
    assert model.patch_embed.proj.weight.requires_grad is learns
    assert model.patch_embed.proj.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_keeps_its_dtype_at_another_size(dtype):
    """Filters and table are resampled as in fp32, then rounded to the dtype."""
    model, wide = tiny().to(dtype), tiny()
    wide.load_state_dict(model.state_dict())
    for one in (model, wide):
        one.set_input_size((24, 24), patch_size=6)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, value in wide.state_dict().items():
        assert_close(model.state_dict()[name].to(value.dtype), value, atol=1e-6, rtol=2**-8)
    assert model(torch.randn(1, 1, 24, 24, dtype=dtype)).dtype == dtype


def test_a_folder_has_the_size_that_the_model_was_set_to(tmp_path):
    """For versions of timm that record the size."""
    pytest.importorskip("timm.models._input")
    model = timm.create_model("vim_nano", **TINY).eval()
    model.set_input_size((16, 28), patch_size=2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    x = torch.randn(1, 1, 16, 28)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


def test_a_model_is_of_the_size_that_its_configuration_says():
    model = timm.create_model("vim_nano", device="meta", pretrained_cfg_overlay={"input_size": (3, 64, 48)})
    assert model.patch_embed.img_size == (64, 48)


def test_patches_of_another_size_keep_their_overlap():
    """Without overlap the stride follows the patch size, with overlap it stays. The bias always stays."""
    for stride, grid, reduction in ((None, (2, 1), 12), (3, (5, 2), 3)):
        model = tiny(patch_size=8, patch_stride=stride)
        assert model.feature_info[0]["reduction"] == (stride or 8)
        bias = model.patch_embed.proj.bias.clone()
        model.set_input_size(patch_size=12)
        assert model.patch_embed.grid_size == grid
        assert model.feature_info[0]["reduction"] == reduction
        assert_close(model.patch_embed.proj.bias, bias, atol=0, rtol=0)
        maps = model.forward_intermediates(torch.randn(1, 1, 24, 16), intermediates_only=True)
        assert maps[0].shape == (1, 16, *grid)


@pytest.mark.parametrize("stride", [None, 4])
def test_a_checkpoint_of_other_patches(stride):
    """The grid of its table follows from its image size, its patch size and the model's stride."""
    model = tiny(img_size=(24, 36), patch_size=12, patch_stride=stride)
    weights = {name: value.clone() for name, value in model.state_dict().items() if name != "pos_embed_grid"}
    other = VisionMamba(**TINY | {"img_size": (24, 36), "patch_size": 6, "patch_stride": stride}).eval()
    other.load_state_dict(checkpoint_filter_fn(weights, other, img_size=(24, 36)))
    model.eval().set_input_size(patch_size=6)
    x = torch.randn(1, 1, 24, 36)
    assert_close(other(x), model(x))


@pytest.mark.parametrize("patch_stride", [None, (2, 5), (4, 3)])
def test_patches_that_are_no_squares(patch_stride):
    """Equals a convolution; pixels that fill no patch are ignored, and an image may be a single patch."""
    embed = PatchEmbed((17, 20), (4, 6), patch_stride, 3, 8)
    assert embed.feat_ratio() == max(patch_stride or (4, 6))
    x = torch.randn(2, 3, 17, 20)
    maps = F.conv2d(x, embed.proj.weight, embed.proj.bias, patch_stride or (4, 6))
    assert embed.grid_size == maps.shape[2:]
    assert_close(embed(x), maps.flatten(2).mT)
    one = PatchEmbed((4, 6), (4, 6), patch_stride, 3, 8)
    one.load_state_dict(embed.state_dict())
    assert_close(one(x[..., :4, :6]), maps[..., 0, 0].unsqueeze(1))


# Dropout and stochastic depth


def test_drop_path_rises_linearly_from_nothing():
    """At a rate of 1 the last block is always dropped and the first one never; the residual stream stays."""
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in tiny(depth=5, drop_path_rate=0.4).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert tiny(depth=1, drop_path_rate=0.4)(torch.randn(1, 1, 24, 16)).isfinite().all()
    model = tiny(drop_path_rate=1.0)
    x = torch.randn(2, 1, 24, 16)
    got, whole = model.train()(x), model.eval()(x)
    model.blocks = model.blocks[:1]
    assert_close(got, model(x))
    assert not torch.allclose(got, whole, atol=1e-3)
    block, x = tiny(drop_path_rate=0.5).blocks[1], torch.randn(1, 9, 16).expand(64, -1, -1)
    added, kept = block.eval()(x)[0] - x[0], block.train()(x) - x
    assert_close(kept[kept.flatten(1).any(1)].mean(0), 2 * added)  # the mean over all samples stays


def test_dropout_stands_in_front_of_the_head():
    model, x = tiny(drop_rate=1.0), torch.randn(2, 1, 24, 16)
    assert_close(model.train()(x), model.head.bias.expand(2, 3))
    assert not model.forward_head(model.forward_features(x), pre_logits=True).any()
    want = model.eval()(x)
    model.head_drop = nn.Identity()
    assert_close(want, model(x))


# Intermediates


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_are_what_the_blocks_put_out(norm, stop_early):
    """Blocks 0 and 2 of 4, with a class token at each end; every format, and the methods of DINO's tools."""
    model, x = tiny(class_token="both", depth=4).eval(), torch.randn(2, 1, 24, 16)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, y: outputs.append(y))

    def split(tokens, normed):
        tokens = model.norm(tokens) if normed else tokens
        return tokens[:, 1:-1], tokens[:, [0, -1]]

    features, both = model.forward_intermediates(x, [0, 2], True, norm, stop_early, "NLC")
    assert len(outputs) == (3 if stop_early else 4)
    want = [split(outputs[i], norm) for i in (0, 2)]
    assert_close(both, want, atol=0, rtol=0)
    patches, prefix = split(outputs[-1], True)
    assert_close(features, torch.cat((prefix, patches), 1), atol=0, rtol=0)
    maps = model.forward_intermediates(x, [0, 2], norm=norm, intermediates_only=True)
    assert_close(maps, [patches.mT.unflatten(2, (6, 4)) for patches, _ in want], atol=0, rtol=0)
    assert_close(model.get_intermediate_layers(x, [0, 2], False, True, norm), want, atol=0, rtol=0)
    assert_close(model.get_intermediate_layers(x, [0, 2], True, norm=norm), maps, atol=0, rtol=0)
    last = model.forward_intermediates(x, 2, norm=True, intermediates_only=True)[1]
    assert_close(last, split(outputs[-1], True)[0].mT.unflatten(2, (6, 4)), atol=0, rtol=0)


def test_another_format_or_initialisation_is_refused():
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        tiny().forward_intermediates(torch.randn(1, 1, 24, 16), output_fmt="NHWC")
    with pytest.raises(ValueError, match="mode must be '', got 'jax'"):
        tiny().init_weights("jax")


@pytest.mark.parametrize(("prune_norm", "prune_head"), [(False, True), (True, False), (True, True)])
def test_a_pruned_model_keeps_what_its_intermediates_need(prune_norm, prune_head):
    model, x = tiny(depth=4).eval(), torch.randn(2, 1, 24, 16)
    want = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2], prune_norm, prune_head) == [0, 2]
    assert len(model.blocks) == 3
    assert_close(model.forward_intermediates(x, [0, 2], intermediates_only=True), want, atol=0, rtol=0)
    assert isinstance(model.norm, nn.Identity) is prune_norm
    assert model(x).shape == ((2, 25, 16) if prune_head else (2, 3))


# Heads


def test_a_new_classifier():
    """It keeps the pooling unless another is given, and has the mode and dtype of the model."""
    model = tiny(class_token="both").double().eval()
    x = torch.randn(2, 1, 24, 16).double()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert (model.num_classes, model.head.training) == (7, False)
    assert_close(model(x), F.linear(pooled, model.head.weight, model.head.bias))
    model.reset_classifier(0)
    assert_close(model(x), pooled)
    model.reset_classifier(0, "avgmax")
    patches = model.forward_features(x)[:, model.num_prefix_tokens :]
    assert_close(model(x), (patches.mean(1) + patches.amax(1)) / 2)
    model.reset_classifier(0, "")
    assert_close(model(x), model.forward_features(x))
    model.reset_classifier(7, "token")
    assert (model(x).shape, model(x).dtype) == ((2, 7), torch.float64)


# Training


def test_learning_rates_by_layer():
    """Scales rise from the stem over the blocks to 1 for the head; the last norm has that of the last block."""
    model = tiny(depth=3)
    scales = {
        name: group["lr_scale"]
        for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5)
        for name, p in model.named_parameters()
        if any(p is other for other in group["params"])
    }

    def expected(name):
        if name.startswith("blocks."):
            return 0.5 ** (3 - int(name.split(".")[1]))
        return {"norm": 0.5, "head": 1}.get(name.split(".")[0], 0.5**4)

    assert scales == {name: expected(name) for name, _ in model.named_parameters()}


def test_where_tables_and_heads_start():
    """Std 0.02, and for the filters 1 / sqrt(pixels of a patch); biases are 0."""
    model = VisionMamba(**TINY | {"embed_dim": 256, "num_classes": 40})
    std = {name: p.std().item() for name, p in model.named_parameters()}
    for name, tolerance in (("pos_embed", 0.06), ("cls_token", 0.15), ("head.weight", 0.06)):
        assert std[name] == pytest.approx(0.02, rel=tolerance), name
    assert std["patch_embed.proj.weight"] == pytest.approx(16**-0.5, rel=0.06)
    assert not model.head.bias.any()
    assert not model.patch_embed.proj.bias.any()


# Options that reach the layers, and the variants


LACKS = {"s4d": ("d_conv", "expand"), "s4": ("d_conv", "expand"), "s4nd": ("d_conv", "expand"), "none": ("d_state",)}
WIDTHS = {"bimamba": (48, 6), "mamba": (48, 6), "s4d": (16, 3), "s4": (16, 3), "s4nd": (16, 3)}  # of A_log


@pytest.mark.parametrize("mixer", ["bimamba", "mamba", "bimamba2", "mamba2", "s4d", "s4", "s4nd", "none"])
def test_sizes_reach_the_mixers(mixer):
    sizes = {"d_state": 6, "d_conv": 3, "expand": 3}
    options = {name: size for name, size in sizes.items() if name not in LACKS.get(mixer, ())}
    model = VisionMamba(**TINY, **PLACES["none"], mixer=mixer, **options)
    shapes = {name: tuple(p.shape) for name, p in model.blocks[1].mixer.named_parameters()}
    assert shapes["out_proj.weight"] == ((16, 48) if "expand" in options else (32, 16))
    taps = [shape for name, shape in shapes.items() if "conv" in name and name.endswith("weight")]
    assert {shape[-1] for shape in taps} == ({3} if "d_conv" in options else set())
    if mixer.endswith("mamba2"):
        assert {shape[0] for shape in taps} == {48 + 2 * 6}  # of x, B and C
    states = {shape for name, shape in shapes.items() if name.endswith("A_log")}
    assert states == {"none": set(), "mamba2": {(3,)}, "bimamba2": {(3,)}}.get(mixer, {WIDTHS.get(mixer)})


def test_what_the_variants_are():
    assert timm.create_model("s4nd_tiny", device="meta").blocks[0].mixer.kernel[1].A_log.shape == (192, 32)
    assert timm.create_model("vim_pixels", device="meta").pos_embed.shape == (1, 784, 64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_are_prepared_as_by_the_authors(variant):
    """The cfgs hold the authors' evaluation transform, and each variant its own file."""
    cfg = timm.get_pretrained_cfg(variant)
    data = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    assert data["interpolation"] == "bicubic"
    pixels = variant == "vim_pixels"
    assert data["input_size"] == ((1, 28, 28) if pixels else (3, 224, 224))
    assert data["crop_pct"] == (1.0 if pixels else 0.875)
    assert data["mean"] == ((0.5,) if pixels else (0.485, 0.456, 0.406))
    assert data["std"] == ((0.5,) if pixels else (0.229, 0.224, 0.225))
    assert cfg.num_classes == (10 if pixels else 1000)
    if cfg.hf_hub_id:
        size = variant.split("_")[1]
        assert cfg.hf_hub_id == f"hustvl/Vim-{size}-midclstok"
        assert cfg.hf_hub_filename.startswith(f"vim_{size[0]}_")
        assert ("_ft_" in cfg.hf_hub_filename) == variant.endswith("stride8")
