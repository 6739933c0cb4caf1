"""Position tables of checkpoints: their grid, and the places of their class entries."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch.testing import assert_close

from vim.models.vision_mamba import VisionMamba, checkpoint_filter_fn
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model

SMALL = {"embed_dim": 16, "depth": 1, "num_classes": 3}
# Grids of 4 x 4 and 8 x 2 patches; 2 x 8 and 4 x 4; 2 x 3 and 3 x 2; 4 x 4 and 2 x 3.
SIZES = [((64, 64), (128, 32)), ((32, 128), (64, 64)), ((32, 48), (48, 32)), ((64, 64), (32, 48))]


def nano(size, **options) -> VisionMamba:
    return timm.create_model("vim_nano", **SMALL | {"img_size": size} | options).eval()


def resized(model: VisionMamba, size) -> VisionMamba:
    """The same model, set to another size."""
    other = nano(model.patch_embed.img_size)
    other.load_state_dict(model.state_dict())
    other.set_input_size(size)
    return other


def folder_of(model, path):
    save_for_hf(model, path, model_args=SMALL | {"img_size": model.patch_embed.img_size}, safe_serialization=True)
    return path


def by_folder(model, size, path):
    return timm.create_model(f"local-dir:{folder_of(model, path)}", pretrained=True, img_size=size)


def by_folder_without_grid(model, size, path):
    """An old folder, whose state dict lacks the grid; its configuration has it."""
    file = folder_of(model, path) / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "pos_embed_grid"}, file)
    return timm.create_model(f"local-dir:{path}", pretrained=True, img_size=size)


def by_file(model, size, path):
    torch.save({"model": model.state_dict()}, path / "weights.pth")
    return nano(size, pretrained=True, pretrained_cfg_overlay={"file": str(path / "weights.pth"), "num_classes": 3})


def by_state_dict(model, size, path):
    overlay = {"source": "", "state_dict": dict(model.state_dict()), "num_classes": 3}
    return nano(size, pretrained=True, pretrained_cfg_overlay=overlay)


def by_file_in_place_of_a_folders(model, size, path):
    """The folder holds another model, with the number of patches of the file."""
    other = folder_of(nano(size), path / "other")
    torch.save(model.state_dict(), path / "weights.pth")
    overlay = {"source": "", "file": str(path / "weights.pth"), "num_classes": 3}
    return timm.create_model(f"local-dir:{other}", pretrained=True, pretrained_cfg_overlay=overlay)


def by_tool_in_place_of_a_folders(model, size, path):
    other = folder_of(nano(size), path / "other")
    torch.save(model.state_dict(), path / "weights.pth")
    return create_model(ModelConfig(str(other), checkpoint=str(path / "weights.pth")), num_classes=3)


def by_filter(model, size, path):
    other = nano(size)
    other.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), other))
    return other


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "load",
    [
        by_folder,
        by_folder_without_grid,
        by_file,
        by_state_dict,
        by_file_in_place_of_a_folders,
        by_tool_in_place_of_a_folders,
        by_filter,
    ],
)
def test_a_table_of_another_grid_is_resampled(load, sizes, tmp_path):
    """Also if the number of patches is the same."""
    model = nano(sizes[0])
    loaded = load(model, sizes[1], tmp_path).eval()
    x = torch.randn(1, 3, *sizes[1])
    assert_close(loaded(x), resized(model, sizes[1])(x), atol=1e-6, rtol=1e-5)
    again = nano(sizes[1])
    again.load_state_dict(loaded.state_dict())
    assert_close(again(x), loaded(x), atol=0, rtol=0)


def by_load_state_dict(model, size, path):
    nano(size).load_state_dict(model.state_dict())


def by_checkpoint_path(model, size, path):
    torch.save(model.state_dict(), path / "weights.pth")
    nano(size, checkpoint_path=path / "weights.pth")


@pytest.mark.parametrize("sizes", SIZES[:3])
@pytest.mark.parametrize("load", [by_load_state_dict, by_checkpoint_path])
def test_a_table_of_as_many_patches_in_another_grid_does_not_load_as_it_is(load, sizes, tmp_path):
    model = nano(sizes[0])
    rows, columns = nano(sizes[1]).patch_embed.grid_size
    message = f"is of {' x '.join(map(str, model.patch_embed.grid_size))} patches, the model's of {rows} x {columns}"
    with pytest.raises(ValueError, match=message):
        load(model, sizes[1], tmp_path)
    load(model, sizes[0], tmp_path)


def test_a_grid_that_nothing_tells_is_refused():
    """A table of 6 patches may be 2 x 3 or 3 x 2."""
    weights = {name: value for name, value in nano((32, 48)).state_dict().items() if name != "pos_embed_grid"}
    for size in ((32, 48), (64, 64)):
        with pytest.raises(ValueError, match="grid of a position table with 6 patches: its length says 2 x 2; give"):
            checkpoint_filter_fn(weights, nano(size))
    with pytest.raises(ValueError, match="grid of a position table with 6 patches"):
        nano((32, 48)).load_state_dict(weights)
    told = checkpoint_filter_fn(weights, nano((32, 48)), img_size=(32, 48))
    assert torch.equal(told["pos_embed"], weights["pos_embed"])
    assert told["pos_embed_grid"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="6 patches: img_size says 4 x 4"):
        checkpoint_filter_fn(weights, nano(64), img_size=64)
    with pytest.raises(ValueError, match="6 patches: pos_embed_grid says 2 x 3 and img_size says 3 x 2"):
        checkpoint_filter_fn(nano((32, 48)).state_dict(), nano(64), img_size=(48, 32))


def test_the_state_dict_has_the_grid_where_it_is_no_square():
    """Square grids have no such tensor, as in official checkpoints."""
    model = nano(64)
    assert "pos_embed_grid" not in model.state_dict()
    model.set_input_size((48, 32))
    assert model.state_dict()["pos_embed_grid"].tolist() == [3, 2]
    model.set_input_size(32)
    assert "pos_embed_grid" not in model.state_dict()
    with torch.device("meta"):
        model = VisionMamba(**SMALL, img_size=(48, 32))
    model.to_empty(device="cpu").init_weights()
    assert model.state_dict()["pos_embed_grid"].tolist() == [3, 2]


def test_a_folder_says_the_size_of_its_table_apart_from_that_of_its_images(tmp_path):
    """A dynamic model was trained with a table of 2 x 8 patches and is evaluated at 64 x 64 pixels."""
    model = nano((32, 128), dynamic_img_size=True)
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    arguments = SMALL | {"img_size": (32, 128), "dynamic_img_size": True}
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "pos_embed_grid"}, file)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_close(loaded(x), model(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 128), (64, 64)])
def test_weights_know_their_grid_better_than_the_configuration_of_their_folder(size, tmp_path):
    """The configuration names a size with the same number of patches: 4 x 4 instead of 2 x 8."""
    model = nano((32, 128))
    save_file(model.state_dict(), folder_of(nano(64), tmp_path) / "model.safetensors")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).eval()
    x = torch.randn(1, 3, *size)
    assert_close(loaded(x), resized(model, size)(x), atol=1e-6, rtol=1e-5)


# The authors' files


OFFICIAL = {
    "middle": ("g1_midcls_p16_img64", {"img_size": 64, "embed_dim": 48, "depth": 3, "num_classes": 10}),
    "both": (
        "g9_vim_doublecls_img40",
        {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 8},
    ),
}


def test_an_official_square_is_no_rectangle_of_as_many_patches(golden):
    name, options = OFFICIAL["middle"]
    model, wide = VisionMamba(**options), VisionMamba(**options | {"img_size": (128, 32)})
    for one in (model, wide):
        one.load_state_dict(golden(name, "state_dict."))
    model.set_input_size((128, 32))
    assert_close(wide.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    ("file", "class_token", "message"),
    [
        (
            "both",
            "middle",
            "has cls_token_head and cls_token_tail, the model class_token='middle'",
        ),
        ("both", "first", "the model class_token='first'; create it with 'both'"),
        ("middle", "both", "has cls_token, the model class_token='both'; create it with 'middle' or 'first'"),
        ("none", "middle", "has no class token, the model class_token='middle'; create it with 'none'"),
        ("half", "none", "has cls_token_head, the model class_token='none'; create it with the one of the checkpoint"),
    ],
)
def test_official_class_tokens_that_the_model_does_not_have_are_refused(file, class_token, message, golden):
    name, options = OFFICIAL[{"none": "middle", "half": "both"}.get(file, file)]
    weights = golden(name, "state_dict.")
    if file == "half":
        del weights["cls_token_tail"]
    if file == "none":
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
        del weights["cls_token"]
    model = VisionMamba(**options, class_token=class_token, global_pool="avg")
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(weights, strict=False)
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn({"model": weights}, model)


@pytest.mark.parametrize("file", OFFICIAL)
def test_a_backbone_leaves_out_official_class_tokens(file, golden):
    name, options = OFFICIAL[file]
    weights = golden(name, "state_dict.")
    backbone = VisionMamba(**options, class_token="none", global_pool="avg")
    backbone.load_state_dict(weights)
    patches = backbone.patch_embed.num_patches
    kept = list(range(1, patches + 1)) if file == "both" else [i for i in range(patches + 1) if i != patches // 2]
    assert torch.equal(backbone.pos_embed, weights["pos_embed"][:, kept])


@pytest.mark.parametrize(("class_token", "tokens"), [("both", 2), ("middle", 1), ("first", 1)])
def test_other_class_tokens_than_the_models_are_refused(class_token, tokens):
    """In native files, too; resampling cannot fix it."""
    other = {"both": "middle"}.get(class_token, "both")
    weights = nano(64, class_token=class_token).state_dict()
    message = f"has {tokens} class tokens, a model with class_token='{other}' has"
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(weights, nano(64, class_token=other))
    backbone = nano(64, class_token="none", global_pool="avg")
    assert torch.equal(checkpoint_filter_fn(weights, backbone)["pos_embed"], weights["pos_embed"][:, tokens:])
