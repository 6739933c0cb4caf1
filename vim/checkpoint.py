"""Checkpoints: written atomically, verified and loaded without running code from them.

A checkpoint is a file. The checkpoint of a sharded model is a folder with a file from each process.
(torch.distributed.checkpoint writes such folders too, but it unpickles arbitrary metadata and stores no checksums.)
"""

import argparse
import math
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vim.console.errors import InterruptedRunError, RunError
from vim.files import link_or_copy, sync_folder, whole_file, why

_PIECE = {"piece", "of_shape"}  # keys of the dict that represents a Piece in a file


@dataclass
class Piece:
    """One process's shard of a tensor that is split along its first dimension. shape: of the whole tensor."""

    tensor: torch.Tensor
    shape: Sequence[int]


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write tensors, numbers, strings, and dicts and lists of them. A failure leaves the earlier file as it was.

    Raises: RunError if the disk is full or cannot be written to.
    """
    cause: BaseException | None
    try:
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            torch.save(state, file)
    except InterruptedRunError:
        raise
    except (OSError, RuntimeError) as error:  # torch hides the file's error behind its own
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        need, free = (size / 2**20 for size in (_bytes(state), _free(path.parent)))
        reason = why(cause) if cause is not None else "the disk is full" if free < need else str(error)
        raise RunError(
            f"cannot save {path}: {reason}. It takes {need:.1f} MiB, {free:.1f} MiB are free; earlier checkpoints are "
            "intact"
        ) from error


def save_shard(state: dict[str, Any], folder: Path, process: int, processes: int) -> None:
    """Write a process's shard of a state to its file in a folder. Like `save_checkpoint`, but takes `Piece`s too."""
    save_checkpoint(_pieces_as_dicts(state), _shard(folder, process, processes))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. Shards are joined to whole tensors.

    Raises: RunError if it is missing, damaged or incomplete, or holds anything but data.
    """
    if not path.is_dir():
        return _load_file(path)
    found = sorted(path.glob("shard-*-of-*.pt"))
    processes = int(found[0].stem.rpartition("-")[2]) if found else 1
    return _joined([_load_file(_shard(path, process, processes)) for process in range(processes)])


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """A model's state dict from a checkpoint: the EMA weights if there are any.

    Raises: as `load_checkpoint`.
    """
    state = load_checkpoint(path)
    return state.get("model_ema", state.get("model", state))


def check_archive(path: Path) -> None:
    """Raise RunError for a damaged file. Detects damage only in archives, the format that torch writes."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not check them
                if (damaged := archive.testzip()) is not None:
                    raise RunError(f"cannot load checkpoint {path}: {damaged} in it is damaged")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, zlib.error) as error:
        raise RunError(f"cannot load checkpoint {path}: {one_line(error)}") from error


def one_line(error: BaseException | None) -> str:
    """The first line of an error's message; torch and safetensors write paragraphs."""
    return str(error).strip().partition("\n")[0].rstrip(":") or type(error).__name__


def unsafe_or_foreign(error: BaseException | None) -> bool:
    """Whether a file was refused because it is no pickle, or a pickle of more than data."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__
    return error is not None


def duplicate(source: Path, path: Path) -> None:
    """Give a checkpoint a second name, replacing any checkpoint there. Nobody may change either in place."""
    unfinished = path.with_name(f".{path.name}.tmp")
    remove(unfinished)
    if source.is_dir():
        shutil.copytree(source, unfinished, copy_function=_link)
    else:
        _link(source, unfinished)
    replace(unfinished, path)


def replace(source: Path, path: Path) -> None:
    """Rename a checkpoint, replacing any checkpoint there. (For folders this is not atomic.)"""
    if source.is_dir() or path.is_dir():
        remove(path)
    source.replace(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _shard(folder: Path, process: int, processes: int) -> Path:
    return folder / f"shard-{process}-of-{processes}.pt"


def _load_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunError(f"no checkpoint {path}")
    check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data in others' checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except InterruptedRunError:
        raise
    except Exception as error:  # torch raises almost anything on a damaged file
        raise RunError(f"cannot load checkpoint {path}: {one_line(error)}") from error


def _link(source: str | Path, path: str | Path) -> None:
    link_or_copy(source, path)
    with open(path, "r+b") as file:
        os.fsync(file.fileno())  # of a copy: the rename must not reach the disk before its content


def _pieces_as_dicts(state: Any) -> Any:
    if isinstance(state, Piece):
        return {"piece": state.tensor, "of_shape": list(state.shape)}
    if isinstance(state, dict):
        return {key: _pieces_as_dicts(value) for key, value in state.items()}
    return [_pieces_as_dicts(value) for value in state] if isinstance(state, list) else state


def _joined(parts: list[Any]) -> Any:
    """Join the shards of a state."""
    first = parts[0]
    if isinstance(first, dict) and first.keys() == _PIECE:
        whole = torch.cat([part["piece"] for part in parts])
        if list(whole.shape) != first["of_shape"]:
            raise RunError(f"shards do not belong together: they join to {list(whole.shape)}, not {first['of_shape']}")
        return whole
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [_joined(list(values)) for values in zip(*parts, strict=True)]
    return first


def _free(folder: Path) -> float:
    """Free bytes; NaN if unknown."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.nan


def _bytes(state: Any) -> int:
    """Total size of the tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes, values))
