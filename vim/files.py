"""Files and folders that are whole or not there, and JSON that every reader takes."""

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
    """A name to write to; it becomes `path` when all is written, so that an interruption leaves the former file.

    The file gets the mode of new files, whatever its writer gives it.
    """
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors makes files that are their owner's alone
        yield unfinished
        unfinished.chmod(mode)
        move_durably(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(root: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `root`, which must not exist, when all is written. A failure leaves nothing."""
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # a temporary folder is its owner's alone
        unfinished.rename(root)
        sync_folder(root.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def move_durably(source: Path, path: Path) -> None:
    """Rename a file that is written; when this returns, a loss of power loses neither its content nor its name."""
    with source.open("r+b") as file:
        os.fsync(file.fileno())  # the rename must not reach the disk before the content
    source.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != "posix":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, path: str | Path) -> None:
    """Give a file, which nobody will change in place, another name."""
    try:
        os.link(source, path)
    except OSError:  # a file system without links
        shutil.copyfile(source, path)


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def write_json(content: Any, path: Path) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(to_json(content, indent=2) + "\n")


def why(error: OSError) -> str:
    """What the system says, in words for a user."""
    return _WHY.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
