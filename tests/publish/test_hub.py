"""Runs on the hub: the card has the run's numbers, the files are the model, and nothing else is published.

No test connects to the hub; they check what would be sent.
"""

import json
import re
import shutil
import sys
from dataclasses import fields
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from image_tree import write_image_tree
from option_effects import Seen
from safetensors.torch import save_file
from whole_runs import interrupt, one_thread  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError, InterruptedRunError, RunError
from vim.data import AugmentConfig, DataConfig
from vim.publish import PushConfig, push_to_hub
from vim.publish.model_card import shareable
from vim.timm_models.config import ModelConfig
from vim.training import Classification, train
from vim.training.averaging import EmaConfig
from vim.training.config import TrainConfig
from vim.training.optim import ScheduleConfig

KWARGS = {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 1}
FILES = {
    "README.md", "config.json", "config.yaml", "confusion_matrix.png", "learning_curve.png", "log.jsonl",
    "model.safetensors", "summary.json",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
sees = Seen()


def test_every_field_has_a_test_that_sees_its_effect():
    assert {(PushConfig, f.name) for f in fields(PushConfig)} == sees


def config(folder, **changes):
    defaults = {
        "run_dir": str(folder / "run"),
        "model": ModelConfig("vim_nano", checkpoint=str(folder / "first.safetensors"), kwargs=KWARGS),
        "data": DataConfig(str(folder / "corners"), batch_size=8, num_workers=0, mean=(0.3,), std=(0.2,)),
        "augment": AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0.0),
        "schedule": ScheduleConfig(epochs=2, warmup_epochs=0),
        "ema": EmaConfig(0.9),
    }
    return TrainConfig(**defaults | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with a run that was given absolute paths, and its summary."""
    folder = tmp_path_factory.mktemp("owner")
    write_image_tree(folder / "corners", {"train": 24, "val": 9}, classes=3)
    save_file(timm.create_model("vim_nano", **KWARGS).state_dict(), folder / "first.safetensors")
    command = [f"{folder}/vim/tools/train.py", "--config", "configs/corners.yaml", f"--data.root={folder}/c d"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", command)
        return folder, train(config(folder))


def push_config(folder, **changes):
    return PushConfig(**{"run_dir": str(folder / "run"), "repo": "ann/corners-vim", "license": "cc0-1.0"} | changes)


@sees(PushConfig, "run_dir", "license", "datasets", "weights", "output")
@pytest.mark.parametrize(("weights", "prefix", "trained"), [("last", "", ""), ("ema", "ema_", "ema")])
@pytest.mark.parametrize("datasets", [["ann/corners", "ann/other"], []])
def test_the_card_has_the_numbers_of_the_published_weights(finished, tmp_path, weights, prefix, trained, datasets):
    folder, summary = finished
    output = tmp_path / "new" / "files"
    push_to_hub(push_config(folder, weights=weights, datasets=datasets, output=str(output)))
    assert {file.name for file in output.iterdir()} == FILES
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("cc0-1.0", "timm", datasets or None)
    assert {"image-classification", "vision-mamba"} <= set(card.data.tags)
    for result, key in zip(card.data.eval_results, ("top1", "top5"), strict=True):
        assert result.metric_value == pytest.approx(summary[prefix + key] / 100, abs=1e-6)
        of = (result.dataset_type, result.dataset_name, result.dataset_split)
        assert of == (datasets[0] if datasets else "corners", "corners", "val")
    for key, name in {"": "last epoch", "ema_": "EMA (exponential moving average)"}.items():
        here = ", in this repository" if key == prefix else ""
        assert f"| {name}{here} | {summary[key + 'top1']:.2f} | {summary[key + 'top5']:.2f} |" in card.text
    assert "| epochs | 2 |" in card.text
    assert "| initial weights | first.safetensors |" in card.text
    assert "train.py --config configs/corners.yaml '--data.root=c d'" in card.text
    assert "![Learning curve](learning_curve.png)" in card.text
    assert ("The plots show the weights of the last epoch." in card.text) == (weights == "ema")

    # The code on the card loads the model of the run, with the folder instead of the repository.
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert '"hf-hub:ann/corners-vim"' in code
    names = {}
    exec(code.replace("hf-hub:ann/corners-vim", f"local-dir:{output}"), names)
    assert list(names["classes"]) == ["a", "b", "c"]
    model = timm.create_model(f"local-dir:{folder / 'run' / trained}", pretrained=True).eval()
    images = torch.randn(3, 1, 12, 12)
    assert torch.equal(names["model"](images), model(images))


def test_no_file_reveals_local_paths(finished, tmp_path):
    folder, _ = finished
    push_to_hub(push_config(folder, output=str(tmp_path / "files")))
    for file in (tmp_path / "files").iterdir():
        assert str(folder).encode() not in file.read_bytes(), file.name
    published = yaml.safe_load((tmp_path / "files" / "config.yaml").read_text())
    assert (published["data"]["root"], published["run_dir"]) == ("corners", "run")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("/home/ann/x", "x"),
        ("~/x/", "x"),
        ("../../ann/x", "x"),
        (r"C:\Users\ann\x y", "x y"),
        ("local-dir:/home/ann/my runs/x", "local-dir:x"),
        ('--data={"root": "/home/ann/x", "val_split": "v"}', '--data={"root": "x", "val_split": "v"}'),
        ("configs/quickstart.yaml", "configs/quickstart.yaml"),
        ("hf-hub:timm/x", "hf-hub:timm/x"),
        ("https://host/x", "https://host/x"),
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
    ],
)
def test_paths_are_cut_and_names_are_not(text, want):
    assert shareable({"key": [text, 3]}) == {"key": [want, 3]}


def test_a_model_of_timm_needs_no_vim_and_a_run_without_its_start_still_has_a_card(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small = KWARGS | {"embed_dim": 16, "num_heads": 2}
    given = config(finished[0], run_dir=str(tmp_path / "run"), model=ModelConfig("vit_tiny_patch16_224", kwargs=small))
    train(given)
    (tmp_path / "run" / "starts.jsonl").unlink()
    (tmp_path / "run" / "confusion_matrix.png").unlink()
    push_to_hub(push_config(tmp_path, output=str(tmp_path / "files")))
    card = ModelCard.load(tmp_path / "files" / "README.md")
    assert "vision-mamba" not in card.data.tags
    assert "vim" not in re.findall(r"```python\n(.*?)\n\n", card.text, re.DOTALL)[0]
    assert "| initial weights | random |" in card.text
    assert "git revision" not in card.text
    assert "confusion" not in card.text


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("vim_nano", "[Vision Mamba](https://arxiv.org/abs/2401.09417)"),
        ("mambar_small", "[Mamba-R](https://arxiv.org/abs/2405.14858)"),
        ("videomamba_base", "[VideoMamba](https://arxiv.org/abs/2403.06977)"),
        ("adventurer_base_patch8", "[Adventurer](https://arxiv.org/abs/2410.07599)"),
        ("arm_base", "[ARM](https://arxiv.org/abs/2406.07537)"),
        ("s4nd_tiny", "[S4ND](https://arxiv.org/abs/2210.06583)"),
    ],
)
def test_the_card_names_the_family(finished, tmp_path, architecture, family):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": architecture}))
    push_to_hub(push_config(tmp_path, output=str(tmp_path / "files")))
    card = ModelCard.load(tmp_path / "files" / "README.md")
    assert f": the {family} `{architecture}` with " in card.text
    assert "import timm, vim " in card.text
    assert "vision-mamba" in card.data.tags


@pytest.fixture
def hub(monkeypatch):
    """Records calls to the hub. `hub.private`: whether the existing repository is private."""
    hub = SimpleNamespace(private=True, created=[], uploaded=[])

    def create_repo(self, repo_id, **arguments):
        hub.created.append((repo_id, arguments))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path, **arguments):
        hub.uploaded.append(({file.name for file in folder_path.iterdir()}, arguments))

    monkeypatch.setattr("vim.publish.hub.get_token", lambda: "a token")
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo_id: SimpleNamespace(private=hub.private))
    return hub


@pytest.mark.parametrize(
    ("name", "pretrained", "first"),
    [
        ("/home/ann/runs/digits", None, "pretrained weights of digits"),
        ("hf-hub:ann/digits", None, "pretrained weights of hf-hub:ann/digits"),
        ("hf-hub:ann/digits", False, "random"),
        ("vim_nano", None, "random"),
        ("vim_tiny", True, "pretrained weights of vim_tiny"),
    ],
)
def test_the_card_says_which_weights_a_run_began_with(finished, tmp_path, name, pretrained, first):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    about = yaml.safe_load(file.read_text())
    about["model"] |= {"name": name, "pretrained": pretrained, "checkpoint": None}
    file.write_text(yaml.safe_dump(about))
    push_to_hub(push_config(tmp_path, output=str(tmp_path / "files")))
    assert f"| initial weights | {first} |" in ModelCard.load(tmp_path / "files" / "README.md").text


def test_the_card_has_the_facts_of_all_starts(finished, tmp_path):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text())
    starts = [
        start | {"command": f"train.py {number}", "git_revision": revision, "processes": processes, "device": "a card"}
        for number, revision, processes in ((1, "abc", 2), (2, "def", 4), (3, None, 4))
    ]
    (tmp_path / "run" / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    summary = finished[1] | {
        "updates": 12345, "skipped_updates": 3, "bad_images": 5, "train_seconds": 3723.4, "images_per_second": 1234.5,
        "seed": 7, "val_images": 5000, "parameters": 7654321,
    }  # fmt: skip
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    push_to_hub(push_config(tmp_path, output=str(tmp_path / "files")))
    text = ModelCard.load(tmp_path / "files" / "README.md").text
    facts = {
        "updates": "12,345",
        "skipped updates (non-finite loss or gradient)": 3,
        "unreadable images": 5,
        "training time (without setup)": "1:02:03",
        "images/s": "1,234",
        "device": "2 x a card, 4 x a card",
        "git revision": "abc, def",
        "seed": 7,
    }
    for name, value in facts.items():
        assert f"| {name} | {value} |" in text
    assert "train.py 1\ntrain.py 2\ntrain.py 3\n" in text
    assert "with 7,654,321 parameters, trained on corners. It predicts one of 3 classes " in text
    assert "for an image of 1 x 12 x 12 (channels, height, width)." in text
    assert "On the 5,000 images of corners/val:" in text


@sees(PushConfig, "repo", "private")
@pytest.mark.parametrize(("private", "asked"), [(True, True), (False, None)])
def test_a_push_is_one_commit_of_all_files(finished, hub, private, asked):
    assert push_to_hub(push_config(finished[0], private=private)) == "https://huggingface.co/ann/corners-vim"
    assert hub.created == [("ann/corners-vim", {"private": asked, "exist_ok": True})]
    upload = {"repo_id": "ann/corners-vim", "commit_message": "vim_nano after 2 epochs"}
    assert hub.uploaded == [(FILES, upload)]


def test_private_files_do_not_go_to_a_public_repository(finished, hub):
    hub.private = False
    with pytest.raises(RunError, match=r"ann/corners-vim exists and is public; make it private"):
        push_to_hub(push_config(finished[0], private=True))
    assert not hub.uploaded


def test_a_hub_that_refuses_or_cannot_be_reached(finished, hub, monkeypatch):
    def refuse(self, **arguments):
        raise ValueError('Invalid metadata in README.md.\n- "license" must be one of [...]')

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(RunError, match=r'cannot push to ann/corners-vim: Invalid metadata .*\n- "license" must be'):
        push_to_hub(push_config(finished[0], license="apache2"))
    monkeypatch.undo()
    monkeypatch.setattr("vim.publish.hub.get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RunError, match=r"cannot push to ann/corners-vim: .*refused"):
        push_to_hub(push_config(finished[0]))


def test_what_is_refused(finished, tmp_path, monkeypatch):
    folder, _ = finished
    with pytest.raises(RunError, match=r"no run in .*nowhere: .*config.yaml is missing"):
        push_to_hub(push_config(folder, run_dir=str(tmp_path / "nowhere")))
    for repo in ("ann/vim/x", "ann/vim digits", "ann/vim--x"):
        with pytest.raises(ConfigError, match=f"repo '{repo}' is not a valid name on the hub: "):
            push_to_hub(push_config(folder, repo=repo))
    with pytest.raises(ConfigError, match="repo must be owner/name, got 'vim'"):
        push_to_hub(push_config(folder, repo="vim"))
    with pytest.raises(RunError, match="exists; choose another --output"):
        push_to_hub(push_config(folder, output=str(folder)))
    with pytest.raises(ValueError, match="license must not be empty"):
        push_config(folder, license=" ")
    monkeypatch.setattr("vim.publish.hub.get_token", lambda: None)
    with pytest.raises(RunError, match="not logged in to the hub: run `hf auth login`, set HF_TOKEN, or only write"):
        push_to_hub(push_config(folder))

    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "config.yaml").write_text("model: {name: vim_nano, detector: fcos}")
    with pytest.raises(RunError, match="holds a detector, which timm cannot load from the hub"):
        push_to_hub(push_config(folder, run_dir=str(tmp_path / "detector")))

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plain = config(folder, run_dir=str(tmp_path / "run"), ema=EmaConfig())
    interrupt(monkeypatch, Classification, 4)
    with pytest.raises(InterruptedRunError):
        train(plain)
    with pytest.raises(RunError, match=r"is not finished: .*summary.json is missing; resume with: python tools/train"):
        push_to_hub(push_config(tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train(plain, resume=True)
    with pytest.raises(ConfigError, match=r"weights is ema, but the run in .* has no EMA"):
        push_to_hub(push_config(tmp_path, weights="ema", output=str(tmp_path / "files")))
