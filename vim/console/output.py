"""Folders for results."""

import tempfile
from pathlib import Path

from .errors import ConfigError


def make_output(folder: str | Path) -> Path:
    """Make a folder for results, or check that it is writable, before the work starts.

    Raises: ConfigError.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}; choose another output") from error
    return Path(folder)
