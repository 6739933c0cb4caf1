"""Lets one process at a time train in a run folder."""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from vim.console.errors import RunError

NAME = ".lock"


class RunLock:
    """A lock on a folder. The system releases it when the process ends, however it ends.

    It is a POSIX file lock: unlike flock, workers do not inherit it, and it works on NFS. It has no effect on Windows,
    or on file systems without locks; for these `acquire` returns a warning.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Lock the folder, which must exist. Returns: a warning if the file system has no locks.

        Raises: RunError that names the process that holds the lock.
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
                raise RunError(f"{owner} is training in {self.path.parent}; wait until it ends, or stop it") from error
            except OSError as error:
                os.close(descriptor)
                reason = f"{self.path.parent} cannot be locked ({error.strerror})"
                return f"warning: {reason}; do not start a second run in it"
            if self._still_in_folder(descriptor):
                break
            os.close(descriptor)  # the previous owner has just removed the file
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor
        return None

    def release(self) -> None:
        """Remove the lock file and unlock the folder, if it is locked."""
        if self._descriptor is not None:
            with suppress(OSError):  # the disk may not be writable any more
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _still_in_folder(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
