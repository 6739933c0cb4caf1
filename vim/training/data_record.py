"""The data of a run, recorded in its checkpoints: a run that resumed with other data could learn wrong labels."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vim.console.errors import RunError
from vim.data.names import plain_name

SHOWN = 3  # examples of each change


class Named(Protocol):
    """Images with names."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...


def names_within(folder: str | Path, images: Named) -> Iterator[str]:
    """Names of images, relative to their folder."""
    prefix = plain_name(f"{folder}{os.sep}")
    return (images.name(index).removeprefix(prefix) for index in range(len(images)))


def record_data(
    classes: list[str], splits: Mapping[str, Iterable[str]], annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    """The record of the data in a checkpoint.

    Args:
        classes: names in label order.
        splits: names of the images of each split in order, relative to their folder.
        annotations: for each split, a hash of other facts about its images.
    """
    record: dict[str, Any] = {"classes": list(classes), "splits": {}}
    for split, names in splits.items():
        # No name contains \0. (The names of ImageNet take 40 MB, compressed a fifth of that.)
        text = "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")
        packed = torch.from_numpy(np.frombuffer(bytearray(zlib.compress(text, 1)), np.uint8))
        about = (annotations or {}).get(split, "")
        digest = hashlib.blake2b(text, digest_size=16).hexdigest()
        record["splits"][split] = {"names": packed, "hash": digest, "annotations": about}
    return record


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RunError with the differences between two records. The folder of the data does not matter."""
    found = _class_changes(saved["classes"], now["classes"])
    if not found:  # (names of images contain those of their classes)
        found = [change for split in now["splits"] if (change := _changes(split, saved["splits"], now["splits"]))]
    if found:
        raise RunError(
            f"the data have changed since the run began: {'; '.join(found)}. Restore them, or start a new run with "
            "another --run_dir"
        )


def _class_changes(saved: list[str], now: list[str]) -> list[str]:
    if len(saved) != len(now):
        gone, new = ([c for c in a if c not in set(b)] for a, b in ((saved, now), (now, saved)))
        return [f"{len(saved)} classes have become {len(now)} ({_listed(new, gone)})"]
    renamed = [f"class {i} was {a!r}, is {b!r}" for i, (a, b) in enumerate(zip(saved, now, strict=True)) if a != b]
    return renamed[:SHOWN] + [f"{len(renamed) - SHOWN} more"] * (len(renamed) > SHOWN)


def _changes(split: str, saved: dict[str, Any], now: dict[str, Any]) -> str:
    if saved[split]["hash"] != now[split]["hash"]:
        before, here = _names(saved[split]), _names(now[split])
        gone, new = (sorted(set(a) - set(b)) for a, b in ((before, here), (here, before)))
        what = _listed(new, gone) or "another order"
        return f"{len(before)} images of {split} have become {len(here)} ({what})"
    return f"the annotations of {split} differ" if saved[split]["annotations"] != now[split]["annotations"] else ""


def _names(split: dict[str, Any]) -> list[str]:
    text = zlib.decompress(split["names"].numpy().tobytes()).decode(errors="surrogateescape")
    return text.split("\0")[:-1]


def _listed(new: list[str], gone: list[str]) -> str:
    texts = []
    for kind, names in (("new", new), ("gone", gone)):
        more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
        texts += [f"{len(names)} {kind}: {', '.join(map(repr, names[:SHOWN]))}{more}"] * bool(names)
    return "; ".join(texts)
