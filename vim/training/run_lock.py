"""One process at a time for a run folder."""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from vim.console.errors import RunError

NAME = ".lock"


class RunLock:
    """A lock on a folder that ends with the process, however it ends.

    It is POSIX's, on a file: unlike flock's, the processes that load images do not inherit it, and it works on NFS.
    Without effect on Windows, and on file systems that have no locks, where `acquire` says so.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Lock the folder, which must be there. Returns: a warning where it cannot be locked.

        Raises: RunError that says who has it.
        """
        if sys.platform == "win32":
            return None
        import fcntl  # not on Windows

        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:  # POSIX allows either
                owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise RunError(f"{owner} trains in {self.path.parent}; wait until it ends, or stop it") from error
            except OSError as error:
                os.close(descriptor)
                return f"warning: {self.path.parent} cannot be locked ({error.strerror}); start no second run in it"
            if self._is_named(descriptor):
                break
            os.close(descriptor)  # whoever had it has just removed the file
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor
        return None

    def release(self) -> None:
        """Unlock the folder, if it was locked, and leave nothing in it."""
        if self._descriptor is not None:
            with suppress(OSError):  # a disk that cannot be written to any more
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _is_named(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
