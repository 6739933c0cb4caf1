"""The maps against the scan and against manual gradients; the sheets end to end."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from image_tree import write_image_tree
from safetensors.torch import save_file
from torch.testing import assert_close

import vim.visualize.sheet
import vim.visualize.state_spaces
from vim.console import ConfigError
from vim.data import EvalDataConfig, eval_transform, open_images
from vim.timm_models.input import resolve_input
from vim.visualize import (
    VisualizeConfig,
    class_map,
    image_maps,
    implicit_attention,
    receptive_field,
    scan_of_block,
    step_sizes,
    visualize,
)
from vim.visualize.maps import block_maps, class_tokens
from vim_kernels import bidirectional_selective_scan, ssd

KWARGS = {"img_size": (16, 12), "patch_size": 4, "depth": 3, "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vim_nano", **KWARGS).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))


def test_the_implicit_attention_is_the_scan(model, images):
    scan = scan_of_block(model, images, 1)
    length = scan["u"][0].shape[1]
    attention = implicit_attention(scan, torch.arange(length))
    sums = 0
    for matrix, u, D in zip(attention, scan["u"], scan["D"], strict=True):
        sums = sums + torch.einsum("btse,bse->bte", matrix, u) + D * u
    y = bidirectional_selective_scan(**scan)
    assert y.abs().max() > 0.01
    assert (0.5 * sums * F.silu(scan["z"]) - y).abs().max() < 1e-5 * y.abs().max()
    assert attention[0][:, 0, 1:].abs().max() == 0  # causal
    assert attention[1][:, -1, :-1].abs().max() == 0
    some = implicit_attention(scan, [3, 7])
    assert torch.equal(some[1], attention[1][:, [3, 7]])


SMALL = KWARGS | {"embed_dim": 16}
ADVENTURER = {"d_state": 6, "head_dim": 8, "flipped_blocks": (1,)}
HEADS = {
    "adventurer": ("adventurer_tiny", SMALL | ADVENTURER),
    "vim": ("vim_nano", SMALL | {"mixer": "mamba2", "embed_dim": 64}),
}


@pytest.mark.parametrize(("name", "kwargs"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("block", [0, 1])
def test_the_implicit_attention_of_heads_is_the_ssd(images, name, kwargs, block):
    """Of the one that the model runs; the channels of a head share their matrix."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    mixer = model.blocks[block].mixer
    seen = []
    handle = mixer.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    model(images)
    handle.remove()
    scan = scan_of_block(model, images, block)
    ((x, output),) = seen
    y = ssd(**scan)
    assert_close(mixer.project_out(y, mixer.project_in(x)[0]), output)
    (attention,) = implicit_attention(scan, torch.arange(x.shape[1]))
    assert attention.shape == (2, x.shape[1], x.shape[1], mixer.heads)
    sums = torch.einsum("btsh,bshp->bthp", attention, scan["x"]) + scan["D"][:, None] * scan["x"]
    assert y.abs().max() > 0.01
    assert (sums - y).abs().max() < 1e-5 * y.abs().max()
    assert attention[:, 0, 1:].abs().max() == 0  # causal
    assert_close(step_sizes(scan)[0], (scan["dt"] + scan["dt_bias"]).exp().log1p())


ORDERS = {
    "vim": ("vim_nano", {}),
    "columns": ("vim_nano", {"scan_order": "column"}),
    "zigzag": ("vim_nano", {"scan_order": "zigzag", "class_token": "both"}),
    "one direction": ("vim_nano", {"mixer": "mamba2"}),
    "registers": ("mambar_small", {"num_registers": 3, "register_dim": 4}),
    "class first": ("videomamba_tiny", {}),
    "rows": ("arm_base", {}),
    "adventurer": ("adventurer_tiny", ADVENTURER | {"flipped_blocks": ()}),
    "adventurer, flipped": ("adventurer_tiny", ADVENTURER | {"flipped_blocks": (0,)}),
}


@pytest.mark.parametrize(("name", "options"), ORDERS.values(), ids=ORDERS)
def test_maps_are_of_the_patches_in_whatever_order_they_are_read(name, options):
    """With a convolution of one tap, a change of a patch changes the step sizes there and nowhere else."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | options | {"depth": 1}).eval()
    for key, p in model.named_parameters():
        if key.endswith("conv1d.weight"):
            p.data[..., :-1] = 0
        if key.endswith(("x_proj.weight", "in_proj.weight")):
            p.data *= 4
    images = torch.randn(1, 3, 16, 12).repeat(2, 1, 1, 1)
    images[1, :, 8:12, 4:8] += 1
    maps = block_maps(model, images, torch.tensor([0, 0]), 0)
    sizes = [value for key, value in maps.items() if key.startswith("step size")]
    assert len(sizes) == (1 if name == "adventurer_tiny" or "mixer" in options else 2)
    for size in sizes:
        assert (size[1] - size[0]).abs().gt(1e-6).nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("block", [0, 1])
def test_what_the_class_token_of_adventurer_reads(images, block):
    """The last row of the matrix, without the heading; block 1 reads the patches from last to first."""
    model = timm.create_model("adventurer_tiny", **SMALL | ADVENTURER).eval()
    maps = block_maps(model, images, torch.tensor([2, 0]), block)
    assert list(maps) == ["step size", "class token reads", "class map"]
    (reads,) = implicit_attention(scan_of_block(model, images, block), [13])
    reads = reads.abs().mean(3)[:, 0, 1:13]
    reads = reads.flip(1) if block else reads
    assert_close(maps["class token reads"], reads.reshape(2, 4, 3).detach())


def test_what_registers_read(images):
    """Three registers, behind 3 patches each: the mean over them."""
    model = timm.create_model("mambar_small", **SMALL | {"num_registers": 3, "register_dim": 4}).eval()
    maps = block_maps(model, images, torch.tensor([2, 0]), 1)
    names = [f"register reads, {way}" for way in ("forward", "backward")]
    assert list(maps) == ["step size, forward", "step size, backward", *names, "class map"]
    patches = [i for i in range(15) if i not in (3, 7, 11)]
    for name, reads in zip(names, implicit_attention(scan_of_block(model, images, 1), [3, 7, 11]), strict=True):
        assert_close(maps[name], reads.abs().mean((1, 3))[:, patches].reshape(2, 4, 3).detach())


def test_the_scan_of_a_block_is_the_one_that_the_model_runs(model, images):
    block = model.blocks[2]
    seen = []
    handle = block.mixer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    handle.remove()
    scan = scan_of_block(model, images, 2)
    assert_close(block.mixer.out_proj(bidirectional_selective_scan(**scan)), seen[0])
    raw = scan["dt"][1] + scan["dt_bias"][1]
    assert_close(step_sizes(scan)[1], raw.exp().log1p())


@pytest.mark.parametrize(("class_token", "places"), [("middle", [6]), ("first", [0]), ("both", [0, 13]), ("none", [])])
def test_maps_leave_the_class_tokens_out(class_token, places):
    pool = "avg" if class_token == "none" else "token"
    model = timm.create_model("vim_nano", **KWARGS, class_token=class_token, global_pool=pool)
    length = 12 + len(places)
    assert class_tokens(model, length).tolist() == places
    values = torch.zeros(1, length)
    patches = [i for i in range(length) if i not in places]
    values[0, patches] = torch.arange(12.0)
    assert torch.equal(image_maps(model, values)[0], torch.arange(12.0).view(4, 3))


def test_class_map_and_receptive_field_by_hand(model, images):
    classes = torch.tensor([2, 0])
    tokens = model.blocks[0](model._embed(images)).detach().requires_grad_()
    logits = model.forward_head(model.prefix_first(model.norm(model.blocks[2](model.blocks[1](tokens)))))
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], tokens)
    patches = [i for i in range(13) if i != 6]
    want = (tokens * gradient[:, patches].mean(1, keepdim=True)).sum(2)[:, patches].relu().view(2, 4, 3)
    assert want.max() > 0
    assert_close(class_map(model, images, classes, 1), want.detach())

    leaf = images.clone().requires_grad_()
    behind = model.blocks[1](model.blocks[0](model._embed(leaf)))
    (gradient,) = torch.autograd.grad(behind[:, patches][:, 2 * 3 + 1].sum(), leaf)
    assert_close(receptive_field(model, images, 1), gradient.abs().sum(1).mean(0))


@pytest.mark.parametrize(("class_token", "places"), [("both", [0, 13]), ("none", [])])
def test_maps_of_a_block_are_of_the_class_tokens_that_there_are(images, class_token, places):
    """The map is the mean over the class tokens. Without class tokens there is none."""
    pool = "avg" if class_token == "none" else "token"
    torch.manual_seed(0)
    model = timm.create_model("vim_nano", **KWARGS, class_token=class_token, global_pool=pool).eval()
    maps = block_maps(model, images, torch.tensor([2, 0]), 1)
    names = [f"class token reads, {way}" for way in ("forward", "backward")] if places else []
    assert list(maps) == ["step size, forward", "step size, backward", *names, "class map"]
    if places:
        for name, reads in zip(names, implicit_attention(scan_of_block(model, images, 1), places), strict=True):
            assert_close(maps[name], reads.abs().mean(3).mean(1)[:, 1:-1].reshape(2, 4, 3).detach())


@pytest.mark.parametrize(
    "look",
    [
        scan_of_block,
        receptive_field,
        lambda model, images, block: class_map(model, images, torch.tensor([2, 0]), block),
    ],
    ids=["scan", "receptive field", "class map"],
)
def test_a_look_into_a_model_leaves_no_hook_behind(model, images, look):
    """Not even if the model cannot take the images."""
    look(model, images, 1)
    with pytest.raises(RuntimeError):
        look(model, images[:, :2], 1)
    assert not [part for part in model.modules() if part._forward_hooks or part._forward_pre_hooks]


@pytest.mark.parametrize(("blocks", "chosen"), [(None, [0, 1, 2]), ([-1, 0], [2, 0])])
def test_a_sheet_shows_what_the_model_makes_of_an_image(model, tmp_path, monkeypatch, blocks, chosen):
    """Class and maps, of images from the first to the last."""
    pytest.importorskip("matplotlib")
    write_image_tree(tmp_path, {"val": 5}, size=20)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    drawn, fields = [], []
    monkeypatch.setattr(vim.visualize.sheet, "_draw", lambda *args: drawn.append(args))
    monkeypatch.setattr(vim.visualize.sheet, "_draw_fields", lambda *args: fields.append(args))
    given = {"images": str(tmp_path / "val"), "output": str(tmp_path / "out"), "count": 3, "blocks": blocks}
    files = visualize(
        VisualizeConfig("vim_nano", checkpoint=str(tmp_path / "weights.safetensors"), kwargs=KWARGS, **given)
    )
    source = open_images(tmp_path / "val")
    data_config = resolve_input(model, KWARGS, EvalDataConfig())
    images = torch.stack([eval_transform(data_config)(source.load(i, 3)) for i in (0, 2, 4)])
    with torch.no_grad():
        probabilities, classes = model(images).softmax(1).max(1)
    assert [args[0] for args in drawn] == files[:3]
    for i, (_, title, shown, rows, named) in enumerate(drawn):
        assert title == f"{source.name(2 * i)}: class {classes[i]}, {probabilities[i]:.0%}"
        mean, std = (torch.tensor(data_config[key]) for key in ("mean", "std"))
        assert_close(torch.from_numpy(shown), (images[i].movedim(0, 2) * std + mean).clamp(0, 1))
        assert named == chosen
        for row, block in zip(rows, chosen, strict=True):
            assert_close(row["class map"], class_map(model, images, classes, block)[i])
            scan = scan_of_block(model, images, block)
            reads = [a.abs().mean((1, 3)) for a in implicit_attention(scan, [6])]  # the class token's
            want = [size.mean(2) for size in step_sizes(scan)] + reads
            names = [f"{what}, {way}" for what in ("step size", "class token reads") for way in ("forward", "backward")]
            assert list(row) == [*names, "class map"]
            for name, values in zip(names, want, strict=True):
                assert_close(row[name], image_maps(model, values)[i].detach())
    ((path, moved, named),) = fields
    assert (path, named) == (files[-1], chosen)
    for field, block in zip(moved, chosen, strict=True):
        assert_close(field, receptive_field(model, images, block))


def test_maps_lie_on_the_whole_image_each_under_its_name_beside_its_block(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(vim.visualize.sheet, "save_figure", lambda figure, path, dpi: figures.append(figure))
    image = np.random.default_rng(0).random((16, 12, 3))
    rows = [{name: torch.rand(4, 3) for name in ("one", "other")} for _ in range(2)]
    vim.visualize.sheet._draw(tmp_path / "x.png", "a title", image, rows, [5, 0])
    vim.visualize.sheet._draw_fields(tmp_path / "x.png", [torch.full((16, 12), 0.25)], [7])
    sheet, fields = figures
    places = [axes for axes in sheet.axes if axes.images and axes.get_label() != "<colorbar>"]
    assert [axes.get_title() for axes in places] == ["", "one", "other", "", "", ""]
    assert [axes.get_ylabel() for axes in places] == ["block 5", "", "", "block 0", "", ""]
    maps = [m for row in rows for m in row.values()]
    for axes, want in zip([axes for axes in places if len(axes.images) == 2], maps, strict=True):
        below, above = axes.images
        assert np.array_equal(below.get_array(), image)
        assert np.array_equal(above.get_array(), want)
        assert above.get_extent() == below.get_extent()
    assert fields.axes[0].get_title() == "after block 7"
    assert (fields.axes[0].images[0].get_array() == 0.5).all()  # the square root


def test_the_figure_of_state_spaces_shows_what_is_known_of_them(tmp_path, monkeypatch):
    """State n of S4D-Lin decays as exp(-t/2) and turns n times in 2; all ways to run a system agree; orders match."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(vim.visualize.state_spaces, "save_figure", lambda figure, path, dpi: figures.append(figure))
    vim.visualize.state_spaces.plot_state_spaces(tmp_path / "out.png")
    axes = {place.get_title(): place for place in figures[0].axes}
    for n, line in enumerate(axes["S4D, lin: slowest states"].lines):
        time = torch.from_numpy(line.get_xdata())
        want = torch.exp(-time / 2) * torch.cos(math.pi * n * time)
        assert_close(torch.from_numpy(line.get_ydata()), want, atol=1e-6, rtol=0)
    for line in axes["S4D, real: slowest states"].lines:
        assert (line.get_ydata() > 0).all()
    first, *others = (torch.from_numpy(line.get_ydata()) for line in axes["one system, three ways to run it"].lines)
    assert first.abs().max() > 1
    for other in others:
        assert_close(other, first, atol=1e-12, rtol=0)
    for line in axes["difference from the recurrence"].lines:
        assert line.get_ydata().max() < 1e-12
    orders = {}
    for line in axes["error by step size"].lines:
        steps, errors = (torch.tensor(data).log() for data in (line.get_xdata(), line.get_ydata()))
        rule, order = line.get_label().split(": order ")
        orders[rule] = float(order)
        slope = (errors[-2] - errors[-1]) / (steps[-2] - steps[-1])
        assert slope.item() == pytest.approx(orders[rule], abs=0.01)
    assert orders == pytest.approx({"zoh": 2, "bilinear": 2, "euler": 1}, abs=0.1)


def test_sheets(tmp_path):
    pytest.importorskip("matplotlib")
    write_image_tree(tmp_path, {"val": 5})
    grey = KWARGS | {"in_chans": 1}
    save_file(timm.create_model("vim_nano", **grey).state_dict(), tmp_path / "weights.safetensors")
    given = {
        "checkpoint": str(tmp_path / "weights.safetensors"),
        "kwargs": grey,
        "images": str(tmp_path / "val"),
        "output": str(tmp_path / "out"),
        "count": 2,
    }
    files = visualize(VisualizeConfig("vim_nano", **given))
    assert [file.name for file in files] == ["0.png", "1.png", "receptive_fields.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    causal = SMALL | ADVENTURER | {"in_chans": 1}
    save_file(timm.create_model("adventurer_tiny", **causal).state_dict(), tmp_path / "causal.safetensors")
    other = given | {"checkpoint": str(tmp_path / "causal.safetensors"), "kwargs": causal, "blocks": [1]}
    assert len(visualize(VisualizeConfig("adventurer_tiny", **other))) == 3
    with pytest.raises(ConfigError, match="the model has blocks 0 to 2, got 3"):
        visualize(VisualizeConfig("vim_nano", blocks=[3], **given))
    headless = given | {"kwargs": grey | {"num_classes": 0}}
    with pytest.raises(ConfigError, match="vim_nano has no classes to explain; choose a classifier"):
        visualize(VisualizeConfig("vim_nano", **headless))
    with pytest.raises(ConfigError, match=r"cannot write to .*val/a/0\.png/x: Not a directory; choose another output"):
        visualize(VisualizeConfig("vim_nano", **given | {"output": str(tmp_path / "val" / "a" / "0.png" / "x")}))
    vit = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "num_heads": 2, "depth": 1}
    for name, kwargs in {"resnet10t": {"in_chans": 1}, "vit_tiny_patch16_224": vit}.items():
        save_file(timm.create_model(name, **kwargs).state_dict(), tmp_path / "other.safetensors")
        other = given | {"checkpoint": str(tmp_path / "other.safetensors"), "kwargs": kwargs}
        with pytest.raises(ConfigError, match=f"{name} is no Vision Mamba"):
            visualize(VisualizeConfig(name, **other))
    for wrong in ({"count": 0}, {"blocks": []}):
        with pytest.raises(ValueError, match="must"):
            VisualizeConfig(**wrong)
