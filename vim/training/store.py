"""A trained model that is none of timm's, as files: model.safetensors and config.json in its run folder."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from vim.files import whole_file, write_json

from .checkpoint import load_weights
from .errors import RunError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_trained(model: nn.Module, about: dict[str, Any], folder: Path) -> None:
    """Write the weights and `about`, from which `read_about` and a constructor make the model again."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / WEIGHTS) as unfinished:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, unfinished)
    write_json(about, folder / CONFIG)


def read_about(folder: Path, kind: str, tool: str) -> dict[str, Any]:
    """What `save_trained` wrote about a model of a kind, which is a key of it.

    Raises: RunError for a folder without a model, or with one of another kind; tool: what would train it.
    """
    if not (folder / CONFIG).is_file():
        raise RunError(f"no {kind} in {folder}: {folder / CONFIG} is missing; give the folder of a finished run")
    about = json.loads((folder / CONFIG).read_text())
    if kind not in about:
        raise RunError(f"{folder} holds another model than a {kind}; train one with {tool}")
    return about


def load_trained(model: nn.Module, folder: Path, checkpoint: str | None) -> None:
    """Put the weights of a run folder into a model.

    Args:
        checkpoint: takes the weights from this file instead: safetensors, or a checkpoint of a run, of which the
            averaged weights count where there are any.

    Raises: RunError for weights that do not fit.
    """
    weights = Path(checkpoint) if checkpoint else folder / WEIGHTS
    state = load_file(weights) if weights.suffix == ".safetensors" else load_weights(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{weights} does not fit the model of {folder}: {error}") from error
