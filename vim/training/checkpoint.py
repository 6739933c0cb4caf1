"""Checkpoint files: written whole or not at all, loaded without running code from them."""

import errno
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import RunError
from .files import whole_file


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write tensors, numbers, strings and their dicts and lists. A failure leaves the earlier file as it was.

    Raises: RunError that says what was missing, for a disk that is full or cannot be written to.
    """
    try:
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch turns what the file says into an error of its own
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        need, free = (size / 2**20 for size in (_bytes(state), shutil.disk_usage(path.parent).free))
        full = free < need or (cause is not None and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        why = "the disk is full" if full else str(cause or error)
        raise RunError(
            f"cannot save {path}: {why}. It takes {need:.1f} MiB, {free:.1f} MiB are free; earlier checkpoints are as "
            "they were"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises: RunError for a file that is missing, damaged, or holds anything but data.
    """
    if not path.is_file():
        raise RunError(f"no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # its checksums, which torch writes and does not read
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        raise RunError(f"cannot load checkpoint {path}: {error}") from error


def duplicate(source: Path, path: Path) -> None:
    """Give a file, which nobody will change in place, another name."""
    with whole_file(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        try:
            os.link(source, unfinished)
        except OSError:  # a file system without links
            shutil.copyfile(source, unfinished)


def _bytes(state: Any) -> int:
    """Of the tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes, values))
