"""Folders that are whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(root: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `root`, which must not exist, when all is written. A failure leaves nothing."""
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # a temporary folder is its owner's alone
        unfinished.rename(root)
        if os.name == "posix":  # the new name reaches the disk, too; Windows opens no folders
            descriptor = os.open(root.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def link_or_copy(source: str | Path, path: str | Path) -> None:
    """Give a file, which nobody will change in place, another name."""
    try:
        os.link(source, path)
    except OSError:  # a file system without links
        shutil.copyfile(source, path)
