"""Files that are whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` when all is written, so that an interruption leaves the former file."""
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(content: Any, path: Path) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
