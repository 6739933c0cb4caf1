"""VisionMamba: the effect of each option, and patches of other sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vim.models.patch_embed import PatchEmbed
from vim.models.vision_mamba import VARIANTS, VisionMamba, checkpoint_filter_fn

TINY = {"img_size": (24, 16), "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}
PLAIN = {"class_token": "none", "global_pool": "avg"}


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


# Training


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
    model = VisionMamba(**TINY, **PLAIN, mixer=mixer, **options)
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
