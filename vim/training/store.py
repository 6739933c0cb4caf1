"""Trained models that timm does not know, such as detectors: model.safetensors and config.json in the run folder."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vim.checkpoint import load_weights
from vim.console.errors import ConfigError, RunError
from vim.files import whole_file, write_json
from vim.timm_models.name import CONFIG, read_json
from vim.timm_models.weights import FOLDER_WEIGHTS, check_file, put, unreadable


def save_trained(model: nn.Module, about: dict[str, Any], folder: Path) -> None:
    """Write the weights, and `about`: what a constructor needs to build the model again."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / FOLDER_WEIGHTS) as unfinished:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, unfinished)
    write_json(about, folder / CONFIG)


def read_about(folder: Path, kind: str, tool: str) -> dict[str, Any]:
    """Read the `about` that `save_trained` wrote.

    Args:
        kind: of model: a key that `about` must have.
        tool: the tool that trains this kind; for the message.

    Raises: RunError for a folder without a model, or with a model of another kind.
    """
    if not (folder / CONFIG).is_file():
        raise RunError(f"no {kind} in {folder}: {folder / CONFIG} is missing; give the folder of a finished run")
    about = read_json(folder / CONFIG)
    if kind not in about:
        raise RunError(f"the model in {folder} is not a {kind}; train one with {tool}")
    return about


def load_trained(model: nn.Module, folder: Path, checkpoint: str | None) -> str:
    """Load the weights of a run folder into a model.

    Args:
        checkpoint: load from this file instead: safetensors, or a run's checkpoint (its EMA weights if it has any).

    Returns: source and number of the weights.
    Raises: ConfigError if the weights do not fit; RunError if the file is damaged.
    """
    path = Path(checkpoint) if checkpoint else folder / FOLDER_WEIGHTS
    check_file(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_weights(path)
    except SafetensorError as error:
        raise ConfigError(unreadable(str(path), error)) from error
    return str(put(model, state, str(path), f"the model of {folder}", "give weights that were trained with it"))
