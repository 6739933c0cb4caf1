"""Released files of the families, from the hub, from disk and through our tools: the authors' logits come out.

The files are synthetic: weights of the golden fixtures, in the containers that the authors publish.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from timm.models import load_checkpoint
from torch import Tensor
from torch.testing import assert_close

import vim  # noqa: F401  (registers the models)
from vim.console.errors import ConfigError
from vim.models.vision_mamba import checkpoint_filter_fn
from vim.timm_models.config import LoadedModelConfig, ModelConfig
from vim.timm_models.create import create_model, load_model

Weights = dict[str, Tensor]


def training_state(weights: Weights) -> dict[str, Any]:
    """As Mamba-R's authors save it. The EMA differs from the weights that they evaluate."""
    parameters = [torch.nn.Parameter(value) for value in weights.values()]
    return {
        "model": weights,
        "optimizer": torch.optim.AdamW(parameters).state_dict(),
        "lr_scheduler": {"last_epoch": 19, "base_values": [1e-5]},
        "epoch": 19,
        "model_ema": {name: value + 1 for name, value in weights.items()},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(model="mambar_base_patch16_224", lr=1e-5),
    }


def distilled(weights: Weights) -> dict[str, Any]:
    """As VideoMamba's authors save a model that learnt from itself: with the head for that."""
    width = weights["norm_f.weight"].shape[0]
    head = {
        "distill_head.0.weight": torch.randn(width),
        "distill_head.1.weight": torch.randn(384, width),
        "distill_head.1.bias": torch.randn(384),
    }
    return {"model": weights | head}


class Released(NamedTuple):
    """A variant at the size of its golden fixture. table: its entries of patches; entry: of the class, if any."""

    variant: str
    fixture: str
    arguments: dict[str, Any]
    file: str
    wrap: Callable[[Weights], dict[str, Any]]
    patches: slice
    entry: int | None


RELEASED = {
    "Mamba-R": Released(
        "mambar_base",
        "g6_mambar_base_r12n4_img64",
        {"img_size": 64, "patch_size": 8, "embed_dim": 40, "depth": 4, "register_dim": 10},
        "Wangf3014/Mamba-Reg mambar_base_patch16_224.pth",
        training_state,
        slice(None),
        None,
    ),
    "VideoMamba": Released(
        "videomamba_base",
        "g7_videomamba_p16_img64",
        {"img_size": 64, "embed_dim": 32, "depth": 4},
        "OpenGVLab/VideoMamba videomamba_b16_in1k_res224.pth",
        distilled,
        slice(1, None),
        0,
    ),
    "Adventurer": Released(
        "adventurer_small",
        "g8_adventurer_hd16_img48",
        {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 7, "d_state": 16, "head_dim": 16},
        "Wangf3014/Adventurer adventurer_small_patch16_224.pth",
        lambda weights: {"model": weights},
        slice(None, -1),
        -1,
    ),
}


class Case(NamedTuple):
    released: Released
    path: str
    weights: Weights  # official names
    images: Tensor
    logits: Tensor  # of the first 10 classes

    def check(self, model: torch.nn.Module) -> None:
        with torch.no_grad():
            logits = model.eval()(self.images)
        assert logits.shape[1] == 1000
        assert (logits[:, :10] - self.logits).abs().max() < 2e-5


@pytest.fixture(params=RELEASED.values(), ids=RELEASED)
def case(request, golden, tmp_path):
    torch.manual_seed(0)
    released = request.param
    weights, tensors = golden(released.fixture, "state_dict."), golden(released.fixture)
    width = weights["head.weight"].shape[1]
    weights["head.weight"] = torch.cat((weights["head.weight"], torch.randn(990, width)))
    weights["head.bias"] = torch.cat((weights["head.bias"], torch.randn(990)))
    path = tmp_path / "released.pth"
    torch.save(released.wrap(weights), path)
    return Case(released, str(path), weights, tensors["input"], tensors["logits_f64"])


def from_hub(monkeypatch, path: str, file: str) -> None:
    """Stand in for the hub: it has the .pth file, and no safetensors."""

    def download(repo_id, filename, **_):
        if not filename.endswith(".pth"):
            raise EntryNotFoundError(filename)
        assert f"{repo_id} {filename}" == file
        return path

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr("vim.timm_models.create.constants.HF_HUB_OFFLINE", True)  # the tools do not look for it


def test_from_the_hub(case, monkeypatch):
    variant, _, arguments, file, *_ = case.released
    from_hub(monkeypatch, case.path, file)
    case.check(timm.create_model(variant, pretrained=True, **arguments))
    case.check(create_model(ModelConfig(variant, pretrained=True, kwargs=arguments), num_classes=None))
    case.check(load_model(LoadedModelConfig(variant, kwargs=arguments)))


def test_from_disk(case, caplog):
    variant, _, arguments, *_ = case.released
    overlay = {"file": case.path}
    case.check(timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **arguments))
    for num_classes in (1000, None):
        config = ModelConfig(variant, checkpoint=case.path, kwargs=arguments)
        case.check(create_model(config, num_classes=num_classes))
    by_filter = timm.create_model(variant, **arguments)
    with torch.serialization.safe_globals([argparse.Namespace]):
        by_filter.load_state_dict(checkpoint_filter_fn(torch.load(case.path), by_filter))
    case.check(by_filter)
    assert not caplog.text
    by_timm = timm.create_model(variant, **arguments)
    load_checkpoint(by_timm, case.path, use_ema=False)
    case.check(by_timm)


def test_from_disk_by_checkpoint_path(case, caplog):
    """timm takes the EMA of a training state. A variant says so if its files may have one and it is not to be used."""
    variant, _, arguments, *_ = case.released
    model = timm.create_model(variant, checkpoint_path=case.path, **arguments)
    warned = f"EMA if the file has one, but the accuracy of {variant} was reported for its other weights" in caplog.text
    assert warned == (variant != "videomamba_base")  # VideoMamba was trained without EMA
    if case.released.wrap is training_state:
        assert_close(model.norm.weight, case.weights["norm_f.weight"] + 1)
    else:
        case.check(model)


def test_at_another_size_with_other_classes_and_channels(case):
    """The table of the patches is resampled, the class entry is not part of its grid; grey filters are sums."""
    variant, _, arguments, _, _, patches, entry = case.released
    edge = arguments.get("patch_size", 16)
    options = arguments | {"img_size": (4 * edge, 7 * edge), "num_classes": 7, "in_chans": 1}
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": case.path}, **options)
    assert model(torch.randn(1, 1, 4 * edge, 7 * edge)).shape == (1, 7)
    table = case.weights["pos_embed"]
    square = round(table[:, patches].shape[1] ** 0.5)
    grid = table[:, patches].unflatten(1, (square, square)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 7), mode="bicubic", antialias=True, align_corners=False)
    assert_close(model.pos_embed[:, -28:], grid.flatten(2).mT, atol=1e-5, rtol=1e-4)
    if entry is None:
        assert torch.equal(model.pos_embed_cls, case.weights["pos_embed_cls"])
    else:
        assert torch.equal(model.pos_embed[0, 0], table[0, entry])
    grey = case.weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert_close(model.patch_embed.proj.weight, grey, atol=1e-6, rtol=1e-5)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_hostile_file_is_refused(case, monkeypatch, capsys):
    variant, _, arguments, file, *_ = case.released
    torch.save(case.released.wrap(case.weights) | {"args": Hostile()}, case.path)
    from_hub(monkeypatch, case.path, file)
    for options in (
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": case.path}},
        {"checkpoint_path": case.path},
    ):
        with pytest.raises(RuntimeError, match="weights_only=True blocked"):
            timm.create_model(variant, **options, **arguments)
    with pytest.raises(ConfigError, match="holds objects besides tensors, numbers and text, which could run code"):
        create_model(ModelConfig(variant, checkpoint=case.path, kwargs=arguments), num_classes=None)
    assert "must never run" not in capsys.readouterr().out


def test_a_video_file_is_refused(golden, tmp_path):
    """It holds the tensors without a container, patches in three dimensions and a table for time."""
    _, fixture, arguments, *_ = RELEASED["VideoMamba"]
    weights = golden(fixture, "state_dict.")
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].unsqueeze(2)
    weights["temporal_pos_embedding"] = torch.zeros(1, 8, 32)
    path = str(tmp_path / "videomamba_t16_k400_f8_res224.pth")
    torch.save(weights, path)
    message = r"patches are \(1, 16, 16\) of a video, a model of images needs two dimensions; take an image file"
    for options in (
        {"pretrained": True, "pretrained_cfg_overlay": {"file": path}},
        {"checkpoint_path": path},
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("videomamba_tiny", num_classes=10, **options, **arguments)
    with pytest.raises(ConfigError, match=message):
        create_model(ModelConfig("videomamba_tiny", checkpoint=path, kwargs=arguments), num_classes=None)


# tag -> file, image size, crop
MAMBAR, VIDEOMAMBA, ADVENTURER = "Wangf3014/Mamba-Reg", "OpenGVLab/VideoMamba", "Wangf3014/Adventurer"
TAGS = {
    **{f"mambar_{s}.wangf3014_in1k": (f"{MAMBAR} mambar_{s}_patch16_224.pth", 224, 1.0) for s in ("small", "large")},
    "mambar_base.wangf3014_in1k": (f"{MAMBAR} mambar_base_patch16_224.pth", 224, 1.0),
    **{
        f"videomamba_{s}.opengvlab_in1k{tag}": (f"{VIDEOMAMBA} videomamba_{s[0]}16_in1k_res224{file}.pth", size, 0.875)
        for s in ("tiny", "small", "middle")
        for tag, file, size in (("", "", 224), ("_448", "to448", 448), ("_576", "to448to576", 576))
    },
    "videomamba_base.opengvlab_in1k": (f"{VIDEOMAMBA} videomamba_b16_in1k_res224.pth", 224, 0.875),
    **{
        f"adventurer_{s}.wangf3014_in1k": (f"{ADVENTURER} adventurer_{s}_patch16_224.pth", 224, 0.875)
        for s in ("tiny", "small", "base", "large")
    },
    "adventurer_base.wangf3014_in1k_384": (f"{ADVENTURER} adventurer_base_patch16_384.pth", 384, 1.0),
    "adventurer_base.wangf3014_in1k_448": (f"{ADVENTURER} adventurer_base_patch16_448.pth", 448, 1.0),
    "adventurer_base_patch8.wangf3014_in1k": (f"{ADVENTURER} adventurer_base_patch8_224.pth", 224, 1.0),
    "adventurer_base_patch8.wangf3014_in1k_448": (f"{ADVENTURER} adventurer_base_patch8_448.pth", 448, 1.0),
}


def test_every_released_file_has_a_tag():
    ours = [f"{family}_*" for family in ("mambar", "videomamba", "adventurer")]
    assert set(TAGS) == set(timm.list_pretrained(ours))


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_makes_a_model_of_its_size(tag, monkeypatch, tmp_path):
    """With the file's table, whole; images are prepared as by the authors."""
    file, size, crop = TAGS[tag]
    options = {"embed_dim": 64, "depth": 1} | ({"register_dim": 8} if tag.startswith("mambar") else {})
    model = timm.create_model(tag, **options)
    assert model.patch_embed.img_size == (size, size)
    path = str(tmp_path / "weights.pth")
    torch.save({"model": model.state_dict()}, path)
    from_hub(monkeypatch, path, file)
    again = timm.create_model(tag, pretrained=True, **options)
    assert torch.equal(again.pos_embed, model.pos_embed)
    data = timm.data.resolve_model_data_config(again)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, size, size), crop, "bicubic")
    assert data["mean"] == (0.485, 0.456, 0.406)
