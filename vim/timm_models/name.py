"""Model names that the tools take: timm's, a run folder, a repository on the hub."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import model_entrypoint

from vim.console.errors import ConfigError, RunError, did_you_mean

CONFIG = "config.json"
HUB = ("hf-hub:", "hf_hub:")


def timm_name(name: str) -> str:
    """The name for timm.create_model. A run folder may be given as a plain path.

    Raises: ConfigError for a model that timm does not have, and a folder without a model.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if (folder / CONFIG).is_file():
        _check_classifier(folder)
        return f"local-dir:{folder}"
    if name.startswith(HUB) or timm.is_model(name):
        return name
    if folder.exists() or name.startswith("local-dir:"):
        raise ConfigError(_no_model_in(folder))
    hint = did_you_mean(name, timm.list_models(), "see timm.list_models()")
    raise ConfigError(f"no model {name!r} in timm, and no run folder of that name{hint}")


def needs_vim(name: str) -> bool:
    """Whether timm has a model of that name only after `import vim`."""
    return timm.is_model(name) and model_entrypoint(name).__module__.startswith("vim.")


def read_json(path: Path) -> dict[str, Any]:
    """Read the configuration of a model.

    Raises: RunError for a file that is damaged or holds something else.
    """
    try:
        about = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise RunError(f"{path} is damaged: {error}; restore the folder from a backup, or train again") from error
    if not isinstance(about, dict):
        raise RunError(f"{path} holds no model configuration; give the folder of a finished run")
    return about


def _check_classifier(folder: Path) -> None:
    about = read_json(folder / CONFIG)
    if "detector" in about:
        raise ConfigError(f"{folder} holds a detector, not a classifier; tools/validate_detection.py takes it")
    if not isinstance(about.get("architecture"), str):
        raise ConfigError(f"{folder / CONFIG} names no architecture; give the folder of a finished run")
    if not timm.is_model(about["architecture"]):
        raise ConfigError(f"{folder / CONFIG} names {about['architecture']!r}, which timm does not have")


def _no_model_in(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file of weights, not a model; give the model's name, and the file as checkpoint"
    if (folder / "config.yaml").is_file():
        last = folder / "checkpoints" / "last.pt"
        return f"the run in {folder} is not finished: no {CONFIG}; give the model's name, and {last} as checkpoint"
    return f"no model in {folder}: {folder / CONFIG} is missing; give the folder of a finished run"
