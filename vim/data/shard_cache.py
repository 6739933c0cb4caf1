"""Files that are made once and shared by all processes of a machine, within a limit of disk space."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path


def shard_folder() -> Path:
    """Where fetched shards lie; the variable HF_ASSETS_CACHE moves it to another disk."""
    return cached_assets_path("vim", "shards")


class ShardCache:
    """A folder of files that are whole or not there, of which the least recently opened ones go first.

    An operating system of POSIX's kind keeps a removed file for those who have it mapped. Whoever wants it later has
    it made again.

    Args:
        folder: to keep them in, and nothing else. All of them have names with one ending.
        limit: bytes of all files together; None for no limit. Files that are being written come on top.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.limit = folder, limit

    def open(self, name: str, write: Callable[[Path], None]) -> mmap.mmap:
        """The content of a file, to read; `write` makes the file if it is not there, in one process at a time."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            return _mapped(path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name):
            try:
                return _mapped(path)  # made by another process meanwhile
            except FileNotFoundError:
                pass
            try:
                write(part)
                with part.open("r+b") as file:
                    os.fsync(file.fileno())  # the name must not reach the disk before the content
                content = _mapped(part)  # before the file has its name: another process may remove it at once
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        self._make_room(path)
        return content

    def remove(self, name: str) -> None:
        """Have a file made anew by who opens it next; those who have it mapped keep it."""
        (self.folder / name).unlink(missing_ok=True)

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        """The operating system opens it when its process ends, however that ends."""
        return FileLock(self.folder / f"{name}.lock", timeout)

    def _make_room(self, newest: Path) -> None:
        with self._lock("room"):
            for part in self.folder.glob("*.part"):
                try:
                    with self._lock(part.stem, timeout=0):
                        part.unlink(missing_ok=True)  # a process was killed before it was done
                except Timeout:
                    pass
            files = [(file, file.stat()) for file in self.folder.glob(f"*{newest.suffix}")]
            used = sum(stat.st_size for _, stat in files)
            for file, stat in sorted(files, key=lambda pair: pair[1].st_mtime_ns):
                if self.limit is None or used <= self.limit:
                    break
                if file != newest:
                    file.unlink()
                    used -= stat.st_size


def _mapped(path: Path) -> mmap.mmap:
    """Raises: FileNotFoundError; also for an empty file, which is none that was made here."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FileNotFoundError(path)
        os.utime(file.fileno())  # opened just now
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
