"""Weights: all tensors of a file reach the model, whatever wraps them, or one line says what does not fit."""

import argparse
import copy
import json
import logging
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from image_tree import write_image_tree
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from whole_runs import one_thread  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError, RunError
from vim.data import AugmentConfig, DataConfig, EvalDataConfig
from vim.detection import load_detector
from vim.detection.detector import Detector, DetectorConfig
from vim.detection.store import StoredDetector, save_detector
from vim.timm_models import create as model_module
from vim.timm_models.config import LoadedModelConfig, ModelConfig
from vim.timm_models.create import create_model, create_model_at, load_model, weights_from
from vim.timm_models.input import resolve_input
from vim.timm_models.name import timm_name
from vim.timm_models.weights import put
from vim.training import train
from vim.training.config import TrainConfig
from vim.training.distillation import DistillConfig
from vim.training.optim import ScheduleConfig

KWARGS = {"img_size": 32, "depth": 2, "embed_dim": 16}
CLASSES = 10


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vim_nano", **KWARGS, num_classes=CLASSES)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The folder of a finished run."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    names = [f"digit {i}" for i in range(CLASSES)]
    save_for_hf(model, path, model_config={"label_names": names}, model_args=KWARGS, safe_serialization=True)
    return str(path)


@pytest.fixture
def saved(tmp_path):
    def save(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


def loaded(checkpoint, num_classes=CLASSES, name="vim_nano", kwargs=KWARGS):
    return create_model(ModelConfig(name, checkpoint=checkpoint, kwargs=kwargs), num_classes)


def assert_same(one, other, but=()):
    for name, weight in one.state_dict().items():
        if not name.startswith(tuple(but)) or not but:
            assert torch.equal(weight, other.state_dict()[name]), name


def prefixed(prefix, model):
    return {prefix + name: weight for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "net.model.", "_orig_mod.module.", "module.model.net."]
)
@pytest.mark.parametrize("container", [None, "model", "state_dict", "module", "net"])
def test_wrappers_come_off(prefix, container, model, saved):
    weights = prefixed(prefix, model)
    made = loaded(saved(weights if container is None else {container: weights, "epoch": 3}))
    assert_same(model, made)
    tensors = len(model.state_dict())
    assert re.fullmatch(rf".*weights.pth \({tensors} of {tensors} tensors\)", weights_from(made))


def test_averaged_weights_of_torch_and_containers_in_containers(model, saved):
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    assert_same(model, loaded(saved({"model": average.state_dict(), "epoch": 1})))
    assert_same(model, loaded(saved({"state_dict": {"model": prefixed("backbone.", model)}})))


def test_a_models_own_names_are_no_wrapper(saved):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(2, 2)

    one, other = Wrapped(), Wrapped()
    put(one, {"model": prefixed("module.", other)}, "file", "it", "")
    assert torch.equal(one.model.weight, other.model.weight)


def test_official_names_load_from_behind_a_wrapper(saved):
    theirs = {
        "cls_token": "cls_token", "head.weight": "head.weight", "head.bias": "head.bias",
        "patch_embed.proj.weight": "patch_embed.proj.weight", "patch_embed.proj.bias": "patch_embed.proj.bias",
        "norm.weight": "norm_f.weight",
    }  # fmt: skip
    model = timm.create_model("vim_nano", **KWARGS, num_classes=CLASSES)
    official = {}
    for name, weight in model.state_dict().items():
        other = theirs.get(name, name.replace("blocks.", "layers."))
        other = re.sub(r"forward_ssm\.", "", other)
        other = re.sub(r"backward_ssm\.(A|D|conv1d|x_proj|dt_proj)", r"\1_b", other)
        official[other] = weight
    table, middle = model.pos_embed.detach(), model.patch_embed.num_patches // 2
    official["pos_embed"] = torch.cat([table[:, 1 : 1 + middle], table[:, :1], table[:, 1 + middle :]], 1)
    for prefix in ("", "backbone.", "module.model."):
        content = {"model": {prefix + name: weight for name, weight in official.items()}, "epoch": 300}
        assert_same(model, loaded(saved(content)))


def test_what_does_not_fit_is_refused_by_name(model, saved):
    weights = model.state_dict()
    tensors = len(weights)
    path = saved({name: weight for name, weight in weights.items() if not name.startswith("blocks.1.")})
    missing = sum(name.startswith("blocks.1.") for name in weights)
    line = (
        rf"^{path} does not fit vim_nano: {missing} of {tensors} tensors are missing \(blocks.1.norm.weight, [^\n]*more"
    )
    with pytest.raises(ConfigError, match=line + r"\); give weights of this model, with the model.kwargs[^\n]*$"):
        loaded(path)
    with pytest.raises(ConfigError, match=r"vim_nano: 2 are left over \(extra.weight, extra.bias\)"):
        loaded(saved(weights | {"extra.weight": torch.ones(1), "extra.bias": torch.ones(1)}))
    for classes in (CLASSES, 2):
        with pytest.raises(ConfigError, match=r"vim_nano: 1 have another shape \(norm.weight \(8,\) for \(16,\)\)"):
            loaded(saved(weights | {"norm.weight": torch.ones(8)}), classes)
    with pytest.raises(
        ConfigError, match=r"model.kwargs.checkpoint_path is not supported; give the file as model.checkpoint"
    ):
        create_model(ModelConfig("vim_nano", kwargs=KWARGS | {"checkpoint_path": path}), CLASSES)
    with pytest.raises(ConfigError, match=r"1 of \d+ tensors are missing \(head.bias\)"):
        loaded(saved({name: weight for name, weight in weights.items() if name != "head.bias"}))


@pytest.mark.parametrize("name", ["vim_nano", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_file_of_another_architecture_is_refused(name, saved, caplog):
    path = saved(timm.create_model("test_resnet", num_classes=CLASSES).state_dict())
    level = logging.getLogger("timm.models._builder").level
    with pytest.raises(
        ConfigError, match=rf"^{path} does not fit {name}: \d+ of \d+ tensors are missing [^\n]*left over"
    ):
        loaded(path, name=name, kwargs={})
    assert not caplog.records, "the line alone"
    assert logging.getLogger("timm.models._builder").level == level, "which holds for this loading alone"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "it holds no weights, nothing"),
        ({"model": {}}, "it holds no weights, nothing"),
        ({"epoch": 3, "best": 0.5}, "it holds no weights, only epoch, best"),
        ([torch.ones(2)], "damaged, or no checkpoint"),
        ({"model": {}, "model_object": torch.nn.Linear(2, 2)}, "objects besides tensors, .* save its state dict alone"),
    ],
)
def test_a_file_without_weights_is_refused(content, match, saved):
    with pytest.raises(ConfigError, match=match) as caught:
        loaded(saved(content))
    assert "\n" not in str(caught.value)


def test_damaged_files_and_folders_are_refused_in_a_line(model, folder, saved, tmp_path):
    whole = saved(model.state_dict())
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "half.pth").write_bytes(Path(whole).read_bytes()[:5000])
    save_file(model.state_dict(), tmp_path / "half.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes()[:5000])
    for name in ("text.pth", "half.pth", "half.safetensors"):
        with pytest.raises((ConfigError, RunError), match=rf"^cannot load .*{name}[^\n]*$"):
            loaded(str(tmp_path / name))
    with pytest.raises(ConfigError, match=rf"{folder} is a folder, not a file .* {folder}/model.safetensors$"):
        loaded(folder)


def test_damaged_and_unfinished_run_folders_are_refused_in_a_line(folder, tmp_path):
    def copied(name, **files):
        path = tmp_path / name
        path.mkdir()
        for file in ("config.json", "model.safetensors"):
            content = Path(folder, file).read_bytes()
            (path / file).write_bytes(files.get(file.partition(".")[0], content))
        return str(path)

    for text in (b'{"architecture": "vim', b"\xff\xfe", b"[1]"):
        with pytest.raises(RunError, match=r"config.json (is damaged|holds no)"):
            create_model(ModelConfig(copied(f"config{len(text)}", config=text)), 3)
    with pytest.raises(ConfigError, match=r"names no architecture"):
        create_model(ModelConfig(copied("other", config=b'{"model_type": "bert"}')), 3)
    with pytest.raises(ConfigError, match=r"^cannot load .*model.safetensors[^\n]*$"):
        create_model(ModelConfig(copied("weights", model=b"broken" * 10)), 3)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    with pytest.raises(ConfigError, match=r"no model in .*config.json is missing"):
        timm_name(str(unfinished))
    (unfinished / "config.yaml").write_text("run_dir: x")
    with pytest.raises(ConfigError, match=r"is not finished.*last.pt as checkpoint"):
        timm_name(str(unfinished))
    with pytest.raises(ConfigError, match=r"is a file of weights, not a model; give the model's name"):
        timm_name(f"{folder}/model.safetensors")


def test_other_classes_make_a_new_head_and_say_so(model, saved):
    made = loaded(saved(model.state_dict()), 2)
    assert_same(model, made, but=["head."])
    assert made.head.weight.shape[0] == 2
    tensors = len(model.state_dict())
    assert weights_from(made).endswith(f"({tensors - 2} of {tensors} tensors; new: head {CLASSES} -> 2)")
    headless = {name: weight for name, weight in model.state_dict().items() if not name.startswith("head.")}
    assert weights_from(loaded(saved(headless), 2)).endswith("; new: head none -> 2)")


def test_both_heads_of_a_distilled_model_are_new(saved):
    kwargs = {"depth": 1, "embed_dim": 48}
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, **kwargs)
    path = saved(source.state_dict())
    made = loaded(path, 2, source.pretrained_cfg["architecture"], kwargs)
    assert weights_from(made).endswith(f"new: head, head_dist {CLASSES} -> 2)")
    assert_same(source, made, but=["head"])
    with pytest.raises(ConfigError, match=r"left over \(dist_token, head_dist.weight, head_dist.bias\)"):
        loaded(path, CLASSES, "deit_tiny_patch16_224", kwargs)


@pytest.mark.parametrize(("of", "to"), [(3, 1), (1, 3)])
def test_other_channels_are_adapted_and_say_so(of, to, saved):
    source = timm.create_model("vim_nano", **KWARGS, num_classes=CLASSES, in_chans=of)
    made = loaded(saved(source.state_dict()), kwargs=KWARGS | {"in_chans": to})
    assert f"adapted: patch_embed.proj {of} -> {to} channels" in weights_from(made)
    # A grey image gives the same logits in one channel and in three equal ones.
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        one, other = source.eval()(grey.expand(-1, of, -1, -1)), made.eval()(grey.expand(-1, to, -1, -1))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_run_folder_brings_its_weights_unless_they_are_refused(model, folder):
    for name in (folder, f"local-dir:{folder}"):
        made = create_model(ModelConfig(name), CLASSES)
        assert_same(model, made)
        assert weights_from(made).startswith(f"{folder}/model.safetensors (")
    made = create_model(ModelConfig(folder), 2)
    assert f"new: head {CLASSES} -> 2" in weights_from(made)
    assert "label_names" not in made.pretrained_cfg, "they are of the data that it was trained on"
    fresh = create_model(ModelConfig(folder, pretrained=False), CLASSES)
    assert weights_from(fresh) is None
    assert not torch.equal(fresh.pos_embed, model.pos_embed)
    assert weights_from(create_model(ModelConfig("vim_nano", kwargs=KWARGS), 3)) is None


def test_a_file_in_place_of_a_folders_weights_is_not_of_the_folders_size(model, saved, tmp_path):
    """The folder's grid has the number of patches of the file, whose square grid is not saved."""
    tall = {**KWARGS, "img_size": (64, 16)}
    save_for_hf(timm.create_model("vim_nano", **tall), tmp_path / "tall", model_args=tall, safe_serialization=True)
    path = saved(model.state_dict())
    made = create_model(ModelConfig(str(tmp_path / "tall"), checkpoint=path, kwargs={"img_size": 48}), CLASSES)
    assert_same(made, loaded(path, kwargs=KWARGS | {"img_size": 48}))


def test_tools_that_do_not_train_refuse_a_head_at_random(model, folder, saved):
    path = saved(model.state_dict())
    with pytest.raises(ConfigError, match=r"new: head 10 -> 1000\): .* at random; set kwargs.num_classes"):
        load_model(LoadedModelConfig("vim_nano", path, KWARGS))
    assert_same(model, load_model(LoadedModelConfig("vim_nano", path, KWARGS | {"num_classes": CLASSES})))
    body = load_model(LoadedModelConfig("vim_nano", path, KWARGS), needs_head=False)
    assert_same(body, model, but=["head."])
    assert_same(model, load_model(LoadedModelConfig(folder)))
    with pytest.raises(ConfigError, match=r"with the kwargs that they were trained with"):
        load_model(LoadedModelConfig("vim_nano", path))
    with pytest.raises(ConfigError, match=r"with the distill.kwargs that"):
        load_model(LoadedModelConfig("vim_nano", path), "distill.")


def test_a_runs_checkpoint_gives_its_averaged_weights(model, saved):
    other = timm.create_model("vim_nano", **KWARGS, num_classes=CLASSES)
    state = {"model": other.state_dict(), "model_ema": model.state_dict(), "optimizer": {}, "update": 3}
    assert_same(model, loaded(saved(state)))
    del state["model_ema"]
    assert_same(other, loaded(saved(state)))


def test_detectors_load_by_the_same_rule(tmp_path, folder):
    about = DetectorConfig("vim_nano", kwargs={"depth": 3, "embed_dim": 16}, detector="fcos", img_size=64, channels=64)
    detector = Detector(about, 2)
    run = tmp_path / "detector"
    save_detector(StoredDetector(detector, about, ["a", "b"], [1, 2]), run)
    weights = load_file(run / "model.safetensors")
    wrapped = str(tmp_path / "wrapped.safetensors")
    save_file({f"module.{name}": weight for name, weight in weights.items()}, wrapped)
    stored = load_detector(run, wrapped)
    assert_same(detector.eval(), stored.model)
    assert stored.weights == f"{wrapped} ({len(weights)} of {len(weights)} tensors)"
    others = tmp_path / "last.pth"  # as timm's training writes them
    last = {"state_dict": Detector(about, 2).state_dict(), "state_dict_ema": weights, "args": argparse.Namespace(lr=1)}
    torch.save(last, others)
    assert_same(detector, load_detector(run, str(others)).model)
    with pytest.raises(ConfigError, match=r"model.safetensors does not fit the model of .*tensors are missing[^\n]*$"):
        load_detector(run, f"{folder}/model.safetensors")
    (tmp_path / "half.safetensors").write_bytes(Path(wrapped).read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"^cannot load .*half.safetensors: it is damaged[^\n]*$"):
        load_detector(run, str(tmp_path / "half.safetensors"))
    with pytest.raises(ConfigError, match=r"holds a detector, not a classifier"):
        load_model(LoadedModelConfig(str(run)))
    with pytest.raises(RunError, match=r"is not a detector"):
        load_detector(folder)
    (run / "config.json").write_text('{"detector": {"name"')
    with pytest.raises(RunError, match=r"config.json is damaged"):
        load_detector(run)
    (run / "config.json").write_text(json.dumps({"detector": {"nome": "vim_nano"}, "classes": [], "category_ids": []}))
    with pytest.raises(RunError, match=r"config.json is damaged or from another version: .*nome"):
        load_detector(run)


def test_a_backbone_takes_a_run_folders_weights(folder, model):
    kwargs = {"depth": 2, "out_indices": [0, 1]}
    detector = Detector(DetectorConfig(folder, kwargs=kwargs, detector="fcos", img_size=64, channels=64), 2)
    assert torch.equal(detector.body.model.blocks[1].norm.weight, model.blocks[1].norm.weight)
    assert re.fullmatch(r".*model.safetensors \((\d+) of \1 tensors\)", weights_from(detector))
    with pytest.raises(ConfigError, match=r"model.kwargs.in_chans must be 3"):
        Detector(DetectorConfig("vim_nano", kwargs={"in_chans": 1}, img_size=64), 2)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_have_one_channel_or_three(channels):
    kwargs = KWARGS | {"in_chans": channels}
    with pytest.raises(ConfigError, match=rf"takes {channels} channels; images have 1 or 3: set in_chans"):
        resolve_input(create_model(ModelConfig("vim_nano", kwargs=kwargs), 3), kwargs, EvalDataConfig())


def test_models_are_made_for_the_size_of_the_data():
    made, kwargs = create_model_at(ModelConfig("vim_nano", kwargs={"depth": 1}), 3, 64)
    assert made(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert kwargs == {"depth": 1, "img_size": 64}
    assert create_model_at(ModelConfig("test_resnet"), 3, 64)[1] == {}
    with pytest.raises(ConfigError, match=r"cannot make vim_nano with model.kwargs .*at least the patch_size"):
        create_model_at(ModelConfig("vim_nano"), 3, 8)


@pytest.mark.parametrize("name", ["vim_tiny", "hf-hub:timm/test_vit.r160_in1k"])
def test_without_a_network_weights_of_the_hub_fail_at_once(name, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the hub's client tries again, 23 seconds for each file"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    instead = "--checkpoint FILE" if name == "vim_tiny" else "local-dir:FOLDER"
    line = rf"^cannot fetch {name}: the hub cannot be reached[^\n]*; without a network give .*{instead}"
    with pytest.raises(ConfigError, match=line):
        load_model(LoadedModelConfig(name))
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(("proxy", "offline"), [("http://proxy:3128", False), (None, True)])
def test_a_hub_behind_a_proxy_is_not_out_of_reach(monkeypatch, proxy, offline):
    """If only a proxy can be reached, the client uses it."""

    def refuse(*_, **__):
        raise OSError("no network")

    seen, create = [], timm.create_model

    def noted(name, pretrained, **kwargs):
        seen.append(constants.HF_HUB_OFFLINE)
        return create(name, **kwargs)

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(model_module, "getproxies", lambda: {"https": proxy} if proxy else {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm, "create_model", noted)
    create_model(ModelConfig("vim_nano", pretrained=True, kwargs={"depth": 1}), CLASSES)
    assert seen == [offline]


@pytest.mark.usefixtures("one_thread")
def test_a_run_says_where_its_weights_are_from_and_a_resumed_one_reads_none(folder, model, saved, tmp_path, capsys):
    write_image_tree(tmp_path / "images", {"train": 8, "val": 4}, classes=2)
    first = saved(model.state_dict(), "first.pth")

    def config(run_dir, epochs=1, **changes):
        return TrainConfig(
            run_dir=str(tmp_path / run_dir),
            data=DataConfig(str(tmp_path / "images"), batch_size=4, num_workers=0),
            augment=AugmentConfig(),
            schedule=ScheduleConfig(epochs=epochs, warmup_epochs=0),
            **changes,
        )

    train(config("random", model=ModelConfig("vim_nano", kwargs=KWARGS), seed=7))
    assert "\ninitial weights: random (seed 7)\n" in capsys.readouterr().out
    distill = DistillConfig(str(tmp_path / "random"))
    train(config("folder", model=ModelConfig(folder), distill=distill))
    out = capsys.readouterr().out
    assert re.search(r"\ninitial weights: .*/model.safetensors \(\d+ of \d+ tensors; new: head 10 -> 2\)\n", out)
    assert re.search(r"the teacher's weights: .*random/model.safetensors \((\d+) of \1 tensors\)\n", out)
    again = config("file", model=ModelConfig("vim_nano", checkpoint=first, kwargs=KWARGS))
    train(again)
    assert f"initial weights: {first} (" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "file" / "checkpoints")  # as if it had been killed before its first save
    again.max_skipped += 1  # which a resume may change
    train(again, resume=True)
    assert yaml.safe_load((tmp_path / "file" / "config.yaml").read_text())["max_skipped"] == again.max_skipped
    assert f"initial weights: {first} (" in capsys.readouterr().out
    (tmp_path / "first.pth").unlink()
    train(again, resume=True)
    out = capsys.readouterr().out
    assert "\nweights: from the run's checkpoint\n" in out
    assert "initial weights" not in out


@pytest.mark.usefixtures("one_thread")
def test_a_run_at_another_size_than_the_models(tmp_path):
    write_image_tree(tmp_path / "images", {"train": 8, "val": 4}, classes=2)
    data = DataConfig(str(tmp_path / "images"), batch_size=4, num_workers=0, img_size=48)
    kwargs = {"depth": 1, "embed_dim": 16}
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig("vim_nano", kwargs=kwargs),
        data=data,
        augment=AugmentConfig(),
        schedule=ScheduleConfig(epochs=1, warmup_epochs=0),
    )
    train(config)
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert again(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    config.run_dir, config.model.kwargs = str(tmp_path / "other"), kwargs | {"img_size": 32}
    with pytest.raises(ConfigError, match=r"takes images of 32 x 32 pixels, data.img_size makes them 48 x 48"):
        train(config)
