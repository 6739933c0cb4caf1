"""A trained model that is none of timm's, as files: model.safetensors and config.json in its run folder."""

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
    """Write the weights and `about`, from which `read_about` and a constructor make the model again."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / FOLDER_WEIGHTS) as unfinished:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, unfinished)
    write_json(about, folder / CONFIG)


def read_about(folder: Path, kind: str, tool: str) -> dict[str, Any]:
    """What `save_trained` wrote about a model of a kind, which is a key of it.

    Raises: RunError for a folder without a model, or with one of another kind; tool: what would train it.
    """
    if not (folder / CONFIG).is_file():
        raise RunError(f"no {kind} in {folder}: {folder / CONFIG} is missing; give the folder of a finished run")
    about = read_json(folder / CONFIG)
    if kind not in about:
        raise RunError(f"{folder} holds another model than a {kind}; train one with {tool}")
    return about


def load_trained(model: nn.Module, folder: Path, checkpoint: str | None) -> str:
    """Put the weights of a run folder into a model.

    Args:
        checkpoint: takes the weights from this file instead: safetensors, or a checkpoint of a run, of which the
            averaged weights count where there are any.

    Returns: where the weights are from, and how many.
    Raises: ConfigError for weights that do not fit, RunError for a file that is damaged.
    """
    path = Path(checkpoint) if checkpoint else folder / FOLDER_WEIGHTS
    check_file(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_weights(path)
    except SafetensorError as error:
        raise ConfigError(unreadable(str(path), error)) from error
    return str(put(model, state, str(path), f"the model of {folder}", "give weights that were trained with it"))
