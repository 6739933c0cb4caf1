"""A cache of files that all processes of a machine share, with a limit on disk space."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path


def shard_folder() -> Path:
    """Folder of fetched shards; the environment variable HF_ASSETS_CACHE moves it."""
    return cached_assets_path("vim", "shards")


class ShardCache:
    """A folder of complete files. Above the limit, the least recently opened files are removed first.

    On POSIX systems a removed file stays readable for processes that have it mapped. A later request makes it again.

    Args:
        folder: holds the files and nothing else. All files have the same suffix.
        limit: bytes of all files together, without those being written; None for no limit.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.limit = folder, limit

    def open(self, name: str, write: Callable[[Path], None]) -> mmap.mmap:
        """Map a file for reading. If it is missing, `write` makes it, in one process at a time."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            return _mapped(path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name):
            try:
                return _mapped(path)  # another process has made it meanwhile
            except FileNotFoundError:
                pass
            try:
                write(part)
                with part.open("r+b") as file:
                    os.fsync(file.fileno())  # the name must not reach the disk before the content
                content = _mapped(part)  # before renaming: another process may remove the file at once
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        self._make_room(path)
        return content

    def remove(self, name: str) -> None:
        """Remove a file, so that the next `open` makes it again. Mapped copies stay readable."""
        (self.folder / name).unlink(missing_ok=True)

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        """A lock that the operating system releases when its process ends, for whatever reason."""
        return FileLock(self.folder / f"{name}.lock", timeout)

    def _make_room(self, newest: Path) -> None:
        with self._lock("room"):
            for part in self.folder.glob("*.part"):
                try:
                    with self._lock(part.stem, timeout=0):
                        part.unlink(missing_ok=True)  # a process was killed while writing
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
    """Raises: FileNotFoundError, also for an empty file: the cache writes none."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FileNotFoundError(path)
        os.utime(file.fileno())  # marks it as recently opened
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
