"""VisionMamba with other mixers and scan orders."""

from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch.testing import assert_close

import vim  # noqa: F401 (registers the models)
from vim.layers import S4
from vim.models.token_layout import patch_order
from vim.models.vision_mamba import VisionMamba

TINY = {"img_size": (24, 16), "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2}
PLAIN = {"class_token": "none", "global_pool": "avg"}
MIXERS = ["bimamba", "mamba", "bimamba2", "mamba2", "s4d", "s4", "s4nd", "none"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def transposed(model, **changes):
    """The same weights for images with rows and columns exchanged."""
    height, width = TINY["img_size"]
    other = VisionMamba(**TINY | changes | {"img_size": (width, height)}).eval()
    weights = model.state_dict()
    prefix = model.num_prefix_tokens
    table = weights["pos_embed"][:, prefix:].unflatten(1, model.patch_embed.grid_size).transpose(1, 2).flatten(1, 2)
    weights["pos_embed"] = torch.cat((weights["pos_embed"][:, :prefix], table), 1)
    weights["pos_embed_grid"] = weights["pos_embed_grid"].flip(0)
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mT.contiguous()
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers(mixer):
    """Every parameter has a gradient; a split batch and other image sizes give consistent outputs."""
    options = PLAIN if mixer == "s4nd" else {}
    model = timm.create_model("vim_nano", **TINY, **options, mixer=mixer)
    x = torch.randn(2, 1, 24, 16)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert_close(model(x[1:]), y[1:], atol=1e-5, rtol=1e-4)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 16, 6, 4)] * 2
    sized = timm.create_model("vim_nano", **TINY, **options, mixer=mixer, dynamic_img_size=True).eval()
    sized.load_state_dict(model.state_dict())
    larger = torch.randn(1, 1, 32, 20)
    model.eval().set_input_size((32, 20))
    assert_close(sized(larger), model(larger), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
@pytest.mark.parametrize("mixer", MIXERS)
def test_traces(mixer):
    """FLOP counters use torch.jit.trace."""
    model = VisionMamba(**TINY, **(PLAIN if mixer == "s4nd" else {}), mixer=mixer).eval()
    traced = torch.jit.trace(model, torch.randn(2, 1, 24, 16))
    x = torch.randn(2, 1, 24, 16)
    assert_close(traced(x), model(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_memory_at_first(mixer):
    """Created on the meta device, then allocated and initialised: the same as a model created directly."""
    options = TINY | (PLAIN if mixer == "s4nd" else {"scan_order": "cross"}) | {"mixer": mixer}
    with torch.device("meta"):
        model = VisionMamba(**options)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    other = VisionMamba(**options)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 24, 16)
    assert_close(other(x), model(x), atol=0, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_features_by_fx_and_shapes_on_meta(mixer):
    """With timm's feature extractor."""
    options = TINY | (PLAIN if mixer == "s4nd" else {}) | {"mixer": mixer}
    model = timm.create_model("vim_nano", **options).eval()
    nodes = create_feature_extractor(model, ["blocks.1"])
    x = torch.randn(1, 1, 24, 16)
    assert_close(model.forward_head(model.prefix_first(model.norm(nodes(x)["blocks.1"]))), model(x))
    assert timm.create_model("vim_nano", **options, device="meta")(x.to("meta")).shape == (1, 3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mambas_of_one_direction_see_the_past_alone(mixer):
    model = timm.create_model("vim_nano", **TINY, **PLAIN, mixer=mixer)
    x = torch.randn(1, 1, 24, 16, requires_grad=True)
    tokens = model.forward_features(x)
    (gradient,) = torch.autograd.grad(tokens[0, 7].sum(), x)  # the last patch of the second row
    assert gradient[..., :8, :].any()
    future, rounding = gradient[..., 8:, :].abs().max(), 1e-5 * gradient.abs().max()
    if mixer in ("mamba", "mamba2"):
        assert future == 0
    else:
        assert future > rounding, "by FFT, one direction has a little of the other"


@pytest.mark.parametrize("mixer", ["bimamba2", "mamba2"])
def test_heads(mixer):
    """Heads are as wide as d_inner allows. Their decays, skips and step sizes have no weight decay."""
    for dim, head_dim in ((192, 64), (16, 32), (24, 16)):
        model = VisionMamba(**TINY | {"embed_dim": dim, "depth": 1}, mixer=mixer)
        assert model.blocks[0].mixer.head_dim == head_dim
    spared = model.no_weight_decay()
    names = [name for name, _ in model.named_parameters() if name.split(".")[-1] in ("A_log", "D", "dt_bias")]
    assert len(names) == (6 if mixer == "bimamba2" else 3)
    assert all(any(fnmatch(name, pattern) for pattern in spared) for name in names)


def test_s4nd_is_equal_along_both_axes():
    """Exchanging rows and columns, and the kernels too, gives the same features."""
    model = VisionMamba(**TINY, **PLAIN, mixer="s4nd").eval()
    other = transposed(model, **PLAIN, mixer="s4nd")
    for block in other.blocks:
        block.mixer.kernel = block.mixer.kernel[::-1]
    x = torch.randn(2, 1, 24, 16)
    assert_close(other(x.mT), model(x), atol=1e-5, rtol=1e-4)


def test_s4nd_works_on_the_grid_when_it_is_wrapped():
    model = VisionMamba(**TINY, **PLAIN, mixer="s4nd").eval()
    x = torch.randn(2, 1, 24, 16)
    want = model(x)
    for block in model.blocks:
        block.mixer = torch.nn.Sequential(block.mixer)
    assert_close(model(x), want)


def test_s4_keeps_its_kernels_for_the_sequence_from_the_start():
    """An EMA copies weights before the first step; a later change of C would mix two meanings."""
    model = VisionMamba(**TINY, mixer="s4")
    assert all(m.kernel.length == 25 for m in model.modules() if isinstance(m, S4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(1, 1, 24, 16))
    assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("options", [{"scan_order": "column"}, {"scan_order": "cross"}, {"mixer": "s4nd"}], ids=str)
def test_checkpointing_keeps_the_order_of_the_tokens(options):
    """Outputs and gradients are those without checkpointing."""
    model, x = VisionMamba(**TINY, **PLAIN, **options), torch.randn(2, 1, 24, 16)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        y = model(x)
        found.append((y, torch.autograd.grad(y.square().sum(), list(model.parameters()))))
    assert_close(*found)


@pytest.mark.parametrize("mixer", ["s4d", "s4", "s4nd"])
def test_kernels_have_no_weight_decay(mixer):
    model = timm.create_model("vim_nano", **TINY, **PLAIN, mixer=mixer)
    kernels = [name for name, _ in model.named_parameters() if ".kernel." in name or name.endswith(".D")]
    assert len(kernels) >= 2 * 6
    for name in kernels:
        assert any(fnmatch(name, pattern) for pattern in model.no_weight_decay())
    assert not any(fnmatch("blocks.0.mixer.out_proj.weight", pattern) for pattern in model.no_weight_decay())


def test_patch_orders():
    grid = (3, 4)
    assert patch_order("column", grid) == (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11)
    assert patch_order("zigzag", grid) == (0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11)
    assert patch_order("window", grid) == tuple(range(12))
    window = patch_order("window", (8, 9))
    assert window[:8] == (0, 1, 2, 3, 4, 5, 6, 9)  # seven patches, then the next row of the window
    assert window[49:51] == (7, 8)
    assert sorted(window) == list(range(72))


@pytest.mark.parametrize("options", [{}, PLAIN, {"class_token": "both"}])
def test_columns_are_rows_of_the_transposed_image(options):
    model = VisionMamba(**TINY, **options, scan_order="column").eval()
    x = torch.randn(2, 1, 24, 16)
    assert_close(model(x), transposed(model, **options)(x.mT), atol=1e-5, rtol=1e-4)
    features, (last,) = model.forward_intermediates(x, 1, norm=True)
    patches = features[:, model.num_prefix_tokens :]
    assert_close(patches.mT.unflatten(2, (6, 4)), last)


@pytest.mark.parametrize("scan_order", ["zigzag", "window"])
def test_orders_differ_and_keep_the_class_token_in_the_middle(scan_order):
    """A sequence reordered by hand, through a raster model, gives the same."""
    kwargs = TINY | {"img_size": 36}  # 9 x 9 patches
    model = VisionMamba(**kwargs, scan_order=scan_order).eval()
    raster = VisionMamba(**kwargs).eval()
    raster.load_state_dict(model.state_dict())
    tokens = torch.randn(1, 82, 16)
    order = torch.tensor(patch_order(scan_order, (9, 9)))
    patches = torch.cat((tokens[:, :40], tokens[:, 41:]), 1)[:, order]
    ordered = torch.cat((patches[:, :40], tokens[:, 40:41], patches[:, 40:]), 1)
    want = raster.blocks[0](ordered)
    got = model.blocks[0](tokens, layout=model._layout(torch.zeros(1, 1, 36, 36)))
    assert_close(got[:, 40], want[:, 40])
    back = torch.cat((got[:, :40], got[:, 41:]), 1)[:, order]
    assert_close(back, torch.cat((want[:, :40], want[:, 41:]), 1))
    assert not torch.allclose(got, raster.blocks[0](tokens), atol=1e-3)


def test_cross_goes_along_rows_and_columns_in_turn():
    model = VisionMamba(**TINY | {"depth": 3}, scan_order="cross").eval()
    assert [block.order for block in model.blocks] == ["raster", "column", "raster"]
    x = torch.randn(1, 1, 24, 16)
    fixed = model(x)
    assert not any("_to_" in name or "_from_" in name for name in model.state_dict())
    moved = VisionMamba(**TINY | {"depth": 3}, scan_order="cross", dynamic_img_size=True).eval()
    moved.load_state_dict(model.state_dict())
    assert_close(moved(x), fixed)
    model.set_input_size((16, 32))
    x = torch.randn(1, 1, 16, 32)
    assert_close(moved(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mixer": "attention"},
            "mixer must be one of 'bimamba', 'mamba', 'bimamba2', 'mamba2', 's4d', 's4', 's4nd', 'none', got 'attent",
        ),
        ({"mixer": "s4nd"}, "mixer 's4nd' works on the grid of the patches and needs class_token 'none'"),
        ({"mixer": "s4nd", "scan_order": "column"} | PLAIN, "scan_order 'raster', got 'none' and 'column'"),
        ({"scan_order": "hilbert"}, "scan_order must be one of .*'cross'.*, got 'hilbert'"),
        ({"class_token": "last"}, "class_token must be one of 'middle', 'first', 'both', 'none', got 'last'"),
        *(
            (PLAIN | {"mixer": mixer, option: 4}, f"mixer '{mixer}' has no {option}, got 4; leave it out")
            for mixer, options in {
                **dict.fromkeys(("s4d", "s4", "s4nd"), ("d_conv", "expand")),
                "none": ("d_state",),
            }.items()
            for option in options
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VisionMamba(**TINY, **options)
