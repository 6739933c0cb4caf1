"""Exported features: content and order, for any number of processes and after any kill."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from image_tree import write_image_tree
from processes import outputs
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import vim
import vim.features
from vim.console import ConfigError, InterruptedRunError, RunError
from vim.data import DataError, eval_transform, image_names, open_images
from vim.features import FeaturesConfig, export, export_features
from vim.features.extract import FeatureExtractor, weights_hash

parquet = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[2]
KWARGS = {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 3, "num_classes": 3}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with weights of a tiny Vim, and 23 images of three classes."""
    path = tmp_path_factory.mktemp("features")
    write_image_tree(path / "images", {"val": 23}, classes=3, size=14)
    torch.manual_seed(0)
    save_file(timm.create_model("vim_nano", **KWARGS).state_dict(), path / "weights.safetensors")
    return path


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def config(setting, output, **changes) -> FeaturesConfig:
    given = {
        "model": "vim_nano",
        "checkpoint": str(setting / "weights.safetensors"),
        "kwargs": KWARGS,
        "images": str(setting / "images" / "val"),
        "output": str(output),
        "rows_per_shard": 5,
        "batch_size": 3,
        "num_workers": 0,
    }
    return FeaturesConfig(**given | changes)


def model_and_images(setting):
    model = timm.create_model("vim_nano", **KWARGS).eval()
    model.load_state_dict(load_file(setting / "weights.safetensors"))
    cfg = timm.data.resolve_data_config({"input_size": (1, 12, 12)}, pretrained_cfg=model.pretrained_cfg)
    mean, std = (sum(cfg[key]) / 3 for key in ("mean", "std"))
    transform = eval_transform({**cfg, "mean": (mean,), "std": (std,)})
    source = open_images(setting / "images" / "val")
    return model, torch.stack([transform(source.load(i, 1)) for i in range(len(source))]), source


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@torch.no_grad()
def test_features_are_those_of_the_model_row_by_row(setting, tmp_path):
    done = export_features(config(setting, tmp_path / "out", pools=["token", "avg", "map"]))
    assert (done["rows"], done["shards"], done["made_now"]) == (23, 5, 5)
    features = vim.features.load(tmp_path / "out")
    model, images, source = model_and_images(setting)
    tokens = model.forward_features(images)
    for name, want in {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(1), "map": tokens[:, 1:]}.items():
        assert features[name].dtype == np.float32
        assert_close(torch.from_numpy(features[name].copy()), want, rtol=1e-5, atol=1e-5)
    assert features.paths == image_names(source)
    assert features.labels.tolist() == [source.label(index) for index in range(len(source))]
    assert features.index.tolist() == list(range(23))
    # The classifier turns them into the model's logits.
    logits = model.head(torch.from_numpy(features["token"].copy()))
    assert_close(logits, model(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_half_precision_and_unit_length(setting, tmp_path):
    pools = ["avg", "token", "map"]
    export_features(config(setting, tmp_path / "out", pools=pools, blocks=[-1, 0], dtype="fp16", l2=True))
    features = vim.features.load(tmp_path / "out")
    assert list(features.columns) == [f"block{block}.{pool}" for block in (0, 2) for pool in pools]
    model, images, _ = model_and_images(setting)
    tokens = model.forward_features(images)  # after the last block and the norm
    want = torch.nn.functional.normalize(tokens[:, 0], dim=-1)
    assert features["block2.token"].dtype == np.float16
    assert_close(torch.from_numpy(features["block2.token"].astype(np.float32)), want, rtol=0, atol=1e-3)
    want = torch.nn.functional.normalize(tokens[:, 1:], dim=-1)
    assert_close(torch.from_numpy(features["block2.map"].astype(np.float32)), want, rtol=0, atol=1e-3)
    # Tokens of the first block equal the final tokens of a model with only that block.
    first = timm.create_model("vim_nano", **KWARGS | {"depth": 1}).eval()
    first.load_state_dict(model.state_dict(), strict=False)
    want = torch.nn.functional.normalize(first.forward_features(images)[:, 1:].mean(1), dim=-1)
    assert_close(torch.from_numpy(features["block0.avg"].astype(np.float32)), want, rtol=0, atol=1e-3)


@pytest.fixture
def made(setting, tmp_path, monkeypatch):
    """made(**options): the features of an export. made.seen: batch sizes and number of workers."""

    def loader(*args, **kw):
        made.seen["batches"] = [len(batch) for batch in kw["batch_sampler"]]  # type: ignore[attr-defined]
        made.seen["workers"] = kw["num_workers"]  # type: ignore[attr-defined]
        return load(*args, **kw | {"num_workers": 0})

    def made(**options):
        export_features(config(setting, tmp_path / f"out{len(list(tmp_path.iterdir()))}", **options))
        return vim.features.load(max(tmp_path.glob("out*"), key=lambda path: int(path.name[3:])))

    made.seen, load, create = {}, export.DataLoader, export.create_accelerator  # type: ignore[attr-defined]
    monkeypatch.setattr(
        export,
        "create_accelerator",
        lambda *args: AcceleratorState._reset_state(reset_partial_state=True) or create(*args),
    )
    monkeypatch.setattr(export, "DataLoader", loader)
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


def other_weights(setting):
    """A file of the model's weights, with the last norm's scaled by three."""
    weights = load_file(setting / "weights.safetensors")
    save_file(weights | {"norm.weight": 3 * weights["norm.weight"]}, setting / "others.safetensors")
    return str(setting / "others.safetensors")


def small_vit(setting):
    """Options of another model with another feature size."""
    kwargs = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "num_heads": 2, "depth": 1}
    save_file(timm.create_model("vit_tiny_patch16_224", **kwargs).state_dict(), setting / "vit.safetensors")
    return {"model": "vit_tiny_patch16_224", "checkpoint": str(setting / "vit.safetensors"), "kwargs": kwargs}


def difference(a, b):
    return np.abs(a["token"].astype(np.float32) - b["token"].astype(np.float32)).max()


EFFECTS = {  # option -> what must hold for its features
    "model": lambda made, at: made(**small_vit(at))["token"].shape == (23, 12),
    "checkpoint": lambda made, at: np.allclose(made(checkpoint=other_weights(at))["token"], 3 * made()["token"], 1e-5),
    "kwargs": lambda made, at: made(kwargs=KWARGS | {"img_size": 16}, pools=["map"])["map"].shape == (23, 16, 64),
    "images": lambda made, at: made(images=str(at / "images" / "val" / "b")).paths[0].endswith("1.png"),
    "output": lambda made, at: made().manifest["rows"] == 23,
    "pools": lambda made, at: list(made(pools=["avg", "token"]).columns) == ["avg", "token"],
    "blocks": lambda made, at: list(made(blocks=[1, -3, 0]).columns) == ["block0.token", "block1.token"],
    "dtype": lambda made, at: [made(dtype=d)["token"].dtype for d in ("fp16", "fp32")] == [np.float16, np.float32],
    "l2": lambda made, at: (
        [bool(np.allclose(np.linalg.norm(made(l2=l2)["token"], axis=1), 1)) for l2 in (True, False)] == [True, False]
    ),
    "format": lambda made, at: made(format="npz").manifest["format"] == "npz",
    "rows_per_shard": lambda made, at: made(rows_per_shard=7).manifest["shards"] == 4,
    "batch_size": lambda made, at: (
        made(batch_size=4, rows_per_shard=10) and made.seen["batches"] == [4, 4, 2] * 2 + [3]
    ),
    "num_workers": lambda made, at: made(num_workers=5) and made.seen["workers"] == 5,
    "precision": lambda made, at: 1e-4 < difference(made(precision="bf16"), made()) < 0.1,
}


@pytest.mark.parametrize("option", [field.name for field in fields(FeaturesConfig)])
def test_each_option_has_its_effect(setting, made, option):
    assert EFFECTS[option](made, setting)


@torch.no_grad()
def test_of_two_class_tokens_the_feature_is_what_the_classifier_reads():
    torch.manual_seed(0)
    model = timm.create_model("vim_nano", **KWARGS | {"class_token": "both"})
    images = torch.randn(2, 1, 12, 12)
    assert_close(model.head(FeatureExtractor(model, ["token"])(images)["token"]), model(images))


@torch.no_grad()
@pytest.mark.parametrize("block", [None, 0])
def test_the_feature_of_registers_that_replace_the_class_token_is_their_mean(block):
    """Mamba-R: as wide as the model, without the neck."""
    torch.manual_seed(0)
    registers = {"embed_dim": 16, "num_registers": 3, "register_dim": 4}
    model = timm.create_model("mambar_small", **KWARGS | registers).eval()
    images, name = torch.randn(2, 1, 12, 12), "" if block is None else f"block{block}."
    tokens = model.forward_features(images)
    if block is not None:
        last = model.blocks[0](model._embed(images))
        tokens = model.prefix_first(model.norm(last))
    columns = FeatureExtractor(model, ["token", "avg"], None if block is None else [block])(images)
    assert_close(columns[f"{name}token"], tokens[:, :3].mean(1))
    assert_close(columns[f"{name}avg"], tokens[:, 3:].mean(1))


@torch.no_grad()
@pytest.mark.parametrize("blocks", [None, [0]])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_registers_are_no_class_token_and_no_patch(name, blocks):
    registers = {"vit_tiny_patch16_224": "reg_tokens", "eva02_tiny_patch14_224": "num_reg_tokens"}[name]
    tiny = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 1, registers: 3}
    torch.manual_seed(0)
    model = timm.create_model(name, **tiny, global_pool="token").eval()
    images = torch.randn(2, 3, 12, 12)
    tokens = model.forward_features(images)
    found = FeatureExtractor(model, ["token", "map"], blocks)(images)
    assert_close(list(found.values()), [tokens[:, 0], tokens[:, 4:]])
    none = timm.create_model(name, **tiny, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="has no class token; take pools avg or map"):
        FeatureExtractor(none, ["token"])


@torch.no_grad()
def test_a_convolutional_model_has_averages_and_maps_but_no_class_token():
    model = timm.create_model("resnet10t", num_classes=3)
    images = torch.randn(2, 3, 64, 64)
    maps = model.eval().forward_features(images)
    found = FeatureExtractor(model.train(), ["avg", "map"])(images)
    assert_close(found["avg"], maps.mean((2, 3)))
    assert_close(found["map"][:, 1], maps[:, :, 0, 1])
    assert FeatureExtractor(model, ["avg"], blocks=[1, -1])(images)["block4.avg"].shape == (2, 512)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=8, num_heads=(1, 1), img_size=56)
    images = torch.randn(1, 3, 56, 56)
    assert_close(FeatureExtractor(swin.eval(), ["map"])(images)["map"], swin.forward_features(images).flatten(1, 2))
    with pytest.raises(ConfigError, match="ResNet has no class token; take pools avg or map"):
        FeatureExtractor(model, ["token"])
    with pytest.raises(ConfigError, match="ResNet has blocks 0 to 4, got 5"):
        FeatureExtractor(model, ["avg"], blocks=[5])


@pytest.mark.parametrize("file_format", ["parquet", "npz", "safetensors"])
def test_formats_hold_the_same_and_are_the_same_bytes_twice(setting, tmp_path, monkeypatch, file_format):
    changes = {"format": file_format, "pools": ["token", "map"], "dtype": "fp16"}
    export_features(config(setting, tmp_path / "one", **changes))
    tomorrow = time.time() + 24 * 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: tomorrow)
        export_features(config(setting, tmp_path / "two", **changes))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    export_features(config(setting, tmp_path / "parquet", **changes | {"format": "parquet"}))
    got, want = (vim.features.load(tmp_path / name) for name in ("one", "parquet"))
    assert got.columns["map"].shape == (23, 9, 64)
    for name in want.columns:
        assert np.array_equal(got[name], want[name])
    assert (got.paths, got.labels.tolist(), got.index.tolist()) == (
        want.paths,
        want.labels.tolist(),
        want.index.tolist(),
    )


def test_images_without_labels(setting, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text(f"{setting}/images/val/c/2.png\n{setting}/images/val/a/0.png\t1\n")
    for file_format in ("parquet", "npz"):
        export_features(config(setting, tmp_path / file_format, images=str(names), format=file_format))
        assert vim.features.load(tmp_path / file_format).labels.tolist() == [-1, 1]
    written = parquet.read_table(tmp_path / "parquet" / "features-00000.parquet")
    assert written["label"].to_pylist() == [None, 1]  # to other programs


def start(setting, output, *args, env=None):
    tool = str(ROOT / "tools" / "export_features.py")
    given = config(setting, output)
    command = [sys.executable, tool, "--kwargs", json.dumps(given.kwargs), *map(str, args)]
    for name in ("model", "checkpoint", "images", "output", "rows_per_shard", "batch_size", "num_workers"):
        command += [f"--{name}", str(getattr(given, name))]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(*processes):
    errors = [error for _, error in outputs(*processes)]
    assert [process.returncode for process in processes] == [0] * len(processes), errors


def test_any_number_of_processes_writes_the_same_bytes(setting, tmp_path):
    for world in (1, 2, 3):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {} for r in range(world)]
        output = tmp_path / str(world)
        finished(*(start(setting, output, env=(common | rank) if world > 1 else None) for rank in ranks))
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2") == bytes_of(tmp_path / "3")
    assert len(vim.features.load(tmp_path / "3")) == 23


def test_a_killed_export_goes_on_to_the_same_bytes(setting, tmp_path):
    finished(start(setting, tmp_path / "whole"))
    process = start(setting, tmp_path / "killed")
    first = tmp_path / "killed" / "features-00000.parquet"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (tmp_path / "killed" / "features-00003.parquet").unlink(missing_ok=True)  # however far the export came
    with pytest.raises(DataError, match=r"is not finished: \d of 5 shards are missing, .*; run it again to continue"):
        vim.features.load(tmp_path / "killed")
    finished(start(setting, tmp_path / "killed"))
    whole, killed = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "killed")
    assert {name: killed[name] for name in whole} == whole


@pytest.mark.parametrize(("batch", "number", "shards"), [(4, signal.SIGTERM, 2), (3, signal.SIGINT, 1)])
def test_a_stopped_export_says_so_and_goes_on_to_the_same_bytes(setting, tmp_path, monkeypatch, batch, number, shards):
    """The signal comes in the last batch of a shard, which is still written, or in the first."""
    batches, check = 0, export._check_finite

    def stop(*args):
        nonlocal batches
        batches += 1
        if batches == batch:
            os.kill(os.getpid(), number)
        check(*args)

    monkeypatch.setattr(export, "_check_finite", stop)
    where = f"stopped by {number.name} with {shards} of 5 shards in {tmp_path / 'out'}; run it again to continue"
    with pytest.raises(InterruptedRunError, match=f"^{re.escape(where)}$") as stopped:
        export_features(config(setting, tmp_path / "out"))
    assert stopped.value.exit_code == 128 + number
    monkeypatch.setattr(export, "_check_finite", check)
    done = export_features(config(setting, tmp_path / "out"))
    assert done["made_now"] == 5 - shards
    assert done["images_per_second"] * done["seconds"] == pytest.approx(23 - 5 * shards)
    export_features(config(setting, tmp_path / "whole"))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("full", [1, 4])
def test_an_export_ends_with_the_error_of_a_full_disk(setting, tmp_path, monkeypatch, full):
    """The disk is full at a middle shard, or at the last."""

    def write(file, *args):
        if file.name == f"features-{full:05d}.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        written(file, *args)

    written = export.write_shard
    monkeypatch.setattr(export, "write_shard", write)
    with pytest.raises(OSError, match="No space left on device"):
        export_features(config(setting, tmp_path / "out"))


def test_what_an_export_refuses(setting, tmp_path):
    export_features(config(setting, tmp_path / "out"))
    assert export_features(config(setting, tmp_path / "out"))["made_now"] == 0
    with pytest.raises(RunError, match=r"holds another export: l2 was False, is True; choose another --output"):
        export_features(config(setting, tmp_path / "out", l2=True))
    for name in ("weights.safetensors", "images"):
        (shutil.copytree if (setting / name).is_dir() else shutil.copy)(setting / name, tmp_path / name)
    own = {"checkpoint": str(tmp_path / "weights.safetensors"), "images": str(tmp_path / "images" / "val")}
    export_features(config(setting, tmp_path / "own", **own))
    (tmp_path / "images/val/a/0.png").rename(tmp_path / "images/val/a/1.png")
    with pytest.raises(RunError, match=r"holds another export: images_sha256 was"):
        export_features(config(setting, tmp_path / "own", **own))
    (tmp_path / "images/val/a/1.png").rename(tmp_path / "images/val/a/0.png")
    paths, names = [f"{setting}/images/val/{name}.png" for name in ("a/0", "c/2")], tmp_path / "names.txt"
    for labels in ((0, 1), (1, 0)):
        names.write_text("".join(f"{path}\t{label}\n" for path, label in zip(paths, labels, strict=True)))
        if labels == (0, 1):
            export_features(config(setting, tmp_path / "listed", images=str(names)))
    with pytest.raises(RunError, match=r"holds another export: images_sha256 was"):
        export_features(config(setting, tmp_path / "listed", images=str(names)))
    (tmp_path / "empty").mkdir()
    assert export_features(config(setting, tmp_path / "empty"))["made_now"] == 5
    shutil.copy(other_weights(setting), tmp_path / "weights.safetensors")
    with pytest.raises(RunError, match=r"holds another export: weights_sha256 was"):
        export_features(config(setting, tmp_path / "own", **own))
    with pytest.raises(RunError, match="exists and holds no export; choose another --output, or remove it"):
        export_features(config(setting, setting))
    with pytest.raises(ConfigError, match="vim_nano has no released weights; name a checkpoint or a run folder"):
        export_features(config(setting, tmp_path / "none", checkpoint=None))
    with pytest.raises(DataError, match="no features in"):
        vim.features.load(tmp_path / "nowhere")
    for wrong, message in [
        ({"pools": []}, "at least one"),
        ({"pools": ["mean"]}, "must be of token, avg, map, got 'mean'"),
        ({"blocks": [1, 1]}, "none twice"),
        ({"batch_size": 0}, "at least 1"),
        ({"num_workers": -1}, "0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            FeaturesConfig(**wrong)


def test_the_hash_of_weights_is_of_names_values_kinds_and_shapes_of_parameters_and_buffers():
    def hashed(change=lambda model: None, model=None):
        model = model or torch.nn.Sequential(torch.nn.BatchNorm1d(4))
        change(model)
        return weights_hash(model)

    def filled(model):
        model[0].running_mean.fill_(1)

    changes = [
        hashed(lambda model: model[0].weight.data.mul_(2)),
        hashed(filled),
        hashed(lambda model: setattr(model[0].weight, "data", torch.ones(2, 2))),
        hashed(lambda model: setattr(model[0].bias, "data", torch.zeros(2, dtype=torch.float64))),  # as many bytes
        hashed(model=torch.nn.ModuleDict({"a": torch.nn.BatchNorm1d(4)})),
    ]
    assert hashed() == hashed()
    assert len({hashed(), *changes}) == 1 + len(changes)


def test_features_that_are_not_finite_name_their_image(setting, tmp_path):
    weights = load_file(setting / "weights.safetensors")
    # One image, in the middle of a batch, has a feature beyond the range of fp16.
    batches = {"rows_per_shard": 9, "batch_size": 6}
    export_features(config(setting, tmp_path / "plain", **batches))
    plain = vim.features.load(tmp_path / "plain")
    largest = np.abs(plain["token"]).max(1)
    row, (second, first) = int(largest.argmax()), np.sort(largest)[-2:]
    assert row % 9 % 6
    weights["norm.weight"].mul_(65504 * 2 / float(first + second))
    save_file(weights, tmp_path / "large.safetensors")
    large = {"checkpoint": str(tmp_path / "large.safetensors"), **batches}
    with pytest.raises(RunError, match=rf"token of {plain.paths[row]} is not finite; fp16 ends at 65504: choose dtype"):
        export_features(config(setting, tmp_path / "fp16", dtype="fp16", **large))
    export_features(config(setting, tmp_path / "fp32", **large))
    shards = {file.name for file in (tmp_path / "fp16").glob("features-*")}
    assert shards == {f"features-{i:05d}.parquet" for i in range(row // 9)}


@pytest.mark.parametrize("file_format", ["parquet", "npz", "safetensors"])
def test_names_that_are_no_text_are_written_escaped(setting, tmp_path, file_format):
    names = {os.fsdecode(b"caf\xe9"): r"caf\xe9", "two\nlines": r"two\nlines"}
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").write_bytes((setting / "images/val/a/0.png").read_bytes())
    export_features(config(setting, tmp_path / "out", images=str(tmp_path / "images"), format=file_format))
    features = vim.features.load(tmp_path / "out")
    assert features.classes == list(names.values())
    assert features.paths == [f"{name}/x.png" for name in names.values()]
    assert features.labels.tolist() == [0, 1]


@pytest.fixture(scope="module")
def exported(setting):
    """A folder of small exports, one per format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for file_format in ("parquet", "npz", "safetensors"):
            export_features(config(setting, setting / f"few-{file_format}", format=file_format))
    return setting


OTHERS = {"checkpoint": "weights.safetensors", "kwargs": KWARGS | {"drop_path_rate": 0.1}, "pools": ["token", "avg"]}
OTHERS |= {"blocks": [2], "dtype": "fp16", "l2": True, "format": "npz", "rows_per_shard": 7, "batch_size": 4}
OTHERS |= {"images": "images/val", "precision": "bf16"}


@pytest.mark.usefixtures("made")
def test_an_export_does_not_go_on_where_one_of_other_options_was(exported, monkeypatch):
    """Not even if the same weights or images are given under another path."""
    monkeypatch.chdir(exported)
    others = {option: {option: other} for option, other in OTHERS.items()} | {"model": small_vit(exported)}
    assert set(others) == {field.name for field in fields(FeaturesConfig)} - {"output", "num_workers"}
    for option, changes in others.items():
        with pytest.raises(RunError, match=rf"holds another export: (.*, )?{option} was "):
            export_features(config(exported, exported / "few-parquet", **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff", "can't decode byte"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b"[]", "it holds list, not a mapping"),
        ({"shards": "5"}, "shards is '5'"),
        ({"shards": 4}, "23 rows in 4 shards of 5"),
        ({"rows": True, "rows_per_shard": 0}, "rows in 5 shards of 0"),
        ({"columns": None}, "columns is None"),
        ({"columns": {"token": [-1]}}, r"the shape of token is \[-1\]"),
        ({"format": "pickle"}, "format is 'pickle'"),
        ({"classes": [0]}, r"classes is \[0\]"),
        ({"classes": ["a"]}, "parquet is damaged: it has labels without a class"),
        ({"columns": {"token": [32]}}, "parquet is damaged: cannot reshape"),
        ({"columns": {"tokens": [64]}}, r"columns \['tokens'\] of pools \['token'\] and blocks None"),
        ({"columns": {}, "pools": []}, r"columns \[\] of pools \[\] and"),
    ],
)
def test_a_damaged_manifest_is_one_line(exported, tmp_path, content, message):
    shutil.copytree(exported / "few-parquet", tmp_path / "few")
    file = tmp_path / "few" / "manifest.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content).encode()
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"is damaged: .*{message.split('damaged: ')[-1]}") as found:
        vim.features.load(tmp_path / "few")
    assert "\n" not in str(found.value)
    with pytest.raises(DataError, match=r"no features in .*manifest.json: .* is missing"):
        vim.features.load(file)


@pytest.mark.parametrize("file_format", ["parquet", "npz", "safetensors"])
def test_a_damaged_shard_is_one_line(exported, tmp_path, file_format):
    shutil.copytree(exported / f"few-{file_format}", tmp_path / "few")
    file = tmp_path / "few" / f"features-00002.{file_format}"
    whole = file.read_bytes()
    other = (tmp_path / "few" / f"features-00001.{file_format}").read_bytes()
    for content in (b"", whole[:100], whole[:-30], b"\0" * 60 + whole[60:], whole[: len(whole) // 2], other):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"few/features-00002.{file_format} is damaged: .*; remove it, and run"):
            vim.features.load(tmp_path / "few")


def test_without_pyarrow_it_says_what_to_install(setting, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (
        lambda: export_features(config(setting, tmp_path)),
        lambda: vim.features.load(exported / "few-parquet"),
    ):
        with pytest.raises(DataError, match=r"features in Parquet need pyarrow: pip install 'vim-mamba\[features\]'"):
            use()
