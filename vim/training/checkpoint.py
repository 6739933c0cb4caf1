"""Checkpoint files: written whole or not at all, loaded without running code from them."""

from pathlib import Path
from typing import Any

import torch

from .errors import RunError
from .files import whole_file


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write tensors, numbers, strings and their dicts and lists. A crash leaves the earlier file as it was."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises: RunError for a file that is missing, damaged, or holds anything but data.
    """
    if not path.is_file():
        raise RunError(f"no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        raise RunError(f"cannot load checkpoint {path}: {error}") from error
