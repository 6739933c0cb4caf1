"""The model card of a trained classifier on the Hugging Face hub, filled from its run folder only."""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg_value

from vim.console.errors import ConfigError, RunError
from vim.console.escapes import visible
from vim.timm_models.name import needs_vim
from vim.training.config import TrainConfig
from vim.training.run_folder import RunFolder

from .config import PushConfig

PLOTS = {"learning_curve.png": "Learning curve", "confusion_matrix.png": "Confusion matrix"}

# Absolute paths, and those that start with ~ or .., reveal users, machines and projects, and help nobody else. Paths
# below the working folder (configs/quickstart.yaml) stay: commands that use them work in any clone.
_PATH = re.compile(r"""(?:^|(?<=[=:"'\[{(, ]))(?:[A-Za-z]:[/\\]|~[/\\]|\.\.[/\\]|/(?!/)|\\)[^"'\]}),]*""")


@dataclass
class FinishedRun:
    """Content of a run folder. Paths outside of the run's working folder are cut to their last part.

    config: content of config.yaml. summary: content of summary.json. starts: lines of starts.jsonl, oldest first.
    weights: folder of model.safetensors and config.json. model: content of that config.json. initial_weights: their
    source.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    starts: list[dict[str, Any]]
    weights: Path
    model: dict[str, Any]
    initial_weights: str

    @property
    def plots(self) -> list[Path]:
        return [self.folder / name for name in PLOTS if (self.folder / name).is_file()]


def read_run(folder: str, weights: str) -> FinishedRun:
    """Read a run folder of an image classifier.

    Args:
        weights: last or ema.

    Raises: RunError for a folder without a finished run, or with one of another kind; ConfigError for weights that the
        run does not have.
    """
    run = RunFolder(folder, TrainConfig.TOOL)
    if not run.config.is_file():
        raise RunError(f"no run in {run.path}: {run.config} is missing; give the folder of a run of {run.tool}")
    config = yaml.safe_load(run.config.read_text())
    if "detector" in config["model"]:
        raise RunError(f"{run.path} holds a detector, which timm cannot load from the hub; give a run of {run.tool}")
    if not run.summary.is_file():
        unfinished = f"the run in {run.path} is not finished: {run.summary} is missing"
        raise RunError(f"{unfinished}; resume with: {run.resume_command}")
    trained = run.path / "ema" if weights == "ema" else run.path
    if not trained.is_dir():
        raise ConfigError(f"weights is ema, but the run in {run.path} has no EMA (ema.decay is 0); choose last")
    starts = run.starts.read_text().splitlines() if run.starts.is_file() else []
    return FinishedRun(
        run.path,
        shareable(config),
        shareable(json.loads(run.summary.read_text())),
        [_start(json.loads(line)) for line in starts],
        trained,
        json.loads((trained / "config.json").read_text()),
        shareable(_initial_weights(**{key: config["model"][key] for key in ("name", "pretrained", "checkpoint")})),
    )


def _initial_weights(name: str, pretrained: bool | None, checkpoint: str | None) -> str:
    if pretrained is None:  # null: pretrained for a folder or repository
        pretrained = not timm.is_model(name)
    return checkpoint or (f"pretrained weights of {name}" if pretrained else "random")


def shareable(value: Any) -> Any:
    """Nested dicts and lists, with every path outside of the working folder cut to its last part."""
    if isinstance(value, dict):
        return {key: shareable(v) for key, v in value.items()}
    if isinstance(value, list):
        return [shareable(v) for v in value]
    return _PATH.sub(lambda path: _name(path[0]), value) if isinstance(value, str) else value


def _start(line: dict[str, Any]) -> dict[str, Any]:
    command = shlex.join(shareable(shlex.split(line["command"])))  # by argument: a path may contain spaces
    return shareable(line | {"command": ""}) | {"command": command}


def model_card(run: FinishedRun, config: PushConfig) -> ModelCard:
    """The model card (README.md): YAML metadata, then text."""
    title = config.repo.split("/")[-1]
    vision_mamba = needs_vim(run.model["architecture"])
    data = ModelCardData(
        license=config.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *["vision-mamba"] * vision_mamba],
        datasets=config.datasets or None,
        model_name=title,
        eval_results=_eval_results(run, config),
    )
    parts = [f"# {title}", _what(run, vision_mamba), _use(config.repo, vision_mamba), _results(run, config.weights)]
    return ModelCard("\n\n".join([f"---\n{data.to_yaml()}\n---", *parts, _training(run)]) + "\n")


def _eval_results(run: FinishedRun, config: PushConfig) -> list[EvalResult]:
    prefix = "ema_" if config.weights == "ema" else ""
    name = visible(_dataset(run))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=config.datasets[0] if config.datasets else name,
            dataset_name=name,
            dataset_split=visible(run.config["data"]["val_split"]),
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(run.summary[prefix + key] / 100, 6),  # the hub's accuracy goes from 0 to 1
        )
        for key, label in {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}.items()
    ]


def _what(run: FinishedRun, vision_mamba: bool) -> str:
    size = " x ".join(map(str, run.model["pretrained_cfg"]["input_size"]))
    data = _plain(_dataset(run))
    kind = _family(run.model["architecture"]) if vision_mamba else "model"
    return (
        f"An image classifier for [timm](https://github.com/huggingface/pytorch-image-models): the {kind} "
        f"`{run.model['architecture']}` with {run.summary['parameters']:,} parameters, trained on {data}. It "
        f"predicts one of {run.model['num_classes']} classes for an image of {size} (channels, height, width)."
    )


def _family(architecture: str) -> str:
    """A link to the paper of one of our models, such as [Vision Mamba](https://arxiv.org/abs/2401.09417)."""
    name, number = (str(get_pretrained_cfg_value(architecture, key)) for key in ("paper_name", "paper_ids"))
    return f"[{name.split(':')[0]}](https://arxiv.org/abs/{number.removeprefix('arXiv:')})"


def _use(repo: str, vision_mamba: bool) -> str:
    imports = "import timm, vim  # importing vim registers the models" if vision_mamba else "import timm"
    return f"""## Use

```python
{imports}

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # takes a PIL image
classes = model.pretrained_cfg["label_names"]
```"""


def _results(run: FinishedRun, weights: str) -> str:
    """Accuracy with the last weights and the EMA, and the plots, which are of the last weights."""
    names = {"last": ("", "last epoch"), "ema": ("ema_", "EMA (exponential moving average)")}
    lines = [
        f"| {name}{', in this repository' * (key == weights)} | {run.summary[prefix + 'top1']:.2f} | "
        f"{run.summary[prefix + 'top5']:.2f} |"
        for key, (prefix, name) in names.items()
        if f"{prefix}top1" in run.summary
    ]
    split = _plain(f"{_dataset(run)}/{run.config['data']['val_split']}")
    about = f"On the {run.summary['val_images']:,} images of {split}:"
    plots = [f"![{PLOTS[plot.name]}]({plot.name})" for plot in run.plots]
    table = "\n".join(["| weights | top-1 (%) | top-5 (%) |", "|---|---|---|", *lines])
    caption = ["The plots show the weights of the last epoch."] if plots and weights == "ema" else []
    return "\n\n".join(["## Results", about, table, *caption, *plots])


def _training(run: FinishedRun) -> str:
    summary = run.summary
    facts = {
        "initial weights": run.initial_weights,
        "epochs": summary["epochs"],
        "updates": f"{summary['updates']:,}",
        "skipped updates (non-finite loss or gradient)": summary["skipped_updates"],
        "unreadable images": summary["bad_images"],
        "training time (without setup)": timedelta(seconds=round(summary["train_seconds"])),
        "images/s": f"{summary['images_per_second']:,.0f}",
        "device": _unique(f"{start['processes']} x {start['device']}" for start in run.starts) or summary["device"],
        "git revision": _unique(str(start["git_revision"]) for start in run.starts if start["git_revision"]),
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "seed": summary["seed"],
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {k} | {_plain(str(v))} |" for k, v in facts.items() if v != "")])
    commands = "\n".join(dict.fromkeys(visible(start["command"]) for start in run.starts))
    return "\n\n".join(
        [
            "## Training",
            table,
            *([_fenced("sh", f"{commands}\n")] if commands else []),
            "<details><summary>config.yaml</summary>",
            _fenced("yaml", yaml.safe_dump(run.config, sort_keys=False)),
            "</details>",
        ]
    )


def _plain(text: str) -> str:
    """Escape a text so that it is not read as Markdown or HTML. An underscore inside a word needs no escape."""
    return re.sub(r"[\\`*\[\]<>|~$&#]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", lambda sign: f"\\{sign[0]}", visible(text))


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def _dataset(run: FinishedRun) -> str:
    return _name(run.config["data"]["root"])


def _name(path: str) -> str:
    """Last part of a path of any operating system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _unique(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
