"""Atomic writes of files and folders, and strict JSON."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file grows beyond what the limit on file sizes (ulimit -f) or the file system allows",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end: an interruption leaves the earlier file.

    The file gets the mode of new files, whatever mode its writer sets.
    """
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors makes files that only their owner can read
        yield unfinished
        unfinished.chmod(mode)
        move_durably(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(root: Path) -> Iterator[Path]:
    """A temporary folder to write to, renamed to `root` at the end. `root` must not exist. A failure leaves nothing."""
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # only its owner can read a temporary folder
        unfinished.rename(root)
        sync_folder(root.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def move_durably(source: Path, path: Path) -> None:
    """Rename a file and sync it: a power failure afterwards loses neither its content nor its name."""
    with source.open("r+b") as file:
        os.fsync(file.fileno())  # the rename must not reach the disk before the content
    source.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    if os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, path: str | Path) -> None:
    """Hard-link a file that nobody changes in place; copy it if the file system has no links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON: non-finite numbers become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def write_json(content: Any, path: Path) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(to_json(content, indent=2) + "\n")


def why(error: OSError) -> str:
    """The reason for a system error, for a message to the user."""
    return _WHY.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
