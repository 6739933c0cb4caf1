"""Which data a run has, kept in its checkpoints: a resumed run that found others would learn from shifted labels."""

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

SHOWN = 3  # examples of each kind


class Named(Protocol):
    """Images with names, as `plain_name` writes them."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...


def names_within(folder: str | Path, images: Named) -> Iterator[str]:
    """Names of images without the folder that they lie in."""
    prefix = plain_name(f"{folder}{os.sep}")
    return (images.name(index).removeprefix(prefix) for index in range(len(images)))


def record_data(
    classes: list[str], splits: Mapping[str, Iterable[str]], annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    """What a checkpoint keeps of the data.

    Args:
        classes: names in label order.
        splits: of each split the names of its images in their order, without the folder that they lie in.
        annotations: of each split a hash of what else is known of its images.
    """
    record: dict[str, Any] = {"classes": list(classes), "splits": {}}
    for split, names in splits.items():
        # Names hold any character but this one. (Those of ImageNet take 40 MB, and packed a fifth of it.)
        text = "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")
        packed = torch.from_numpy(np.frombuffer(bytearray(zlib.compress(text, 1)), np.uint8))
        about = (annotations or {}).get(split, "")
        digest = hashlib.blake2b(text, digest_size=16).hexdigest()
        record["splits"][split] = {"names": packed, "hash": digest, "annotations": about}
    return record


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RunError that says what differs between two records; where the data lie does not matter."""
    found = _class_changes(saved["classes"], now["classes"])
    if not found:  # (the names of classes are part of those of images)
        found = [change for split in now["splits"] if (change := _changes(split, saved["splits"], now["splits"]))]
    if found:
        raise RunError(
            f"the data are not those that the run began with: {'; '.join(found)}. Put them back, or start a new run "
            "with another --run_dir"
        )


def _class_changes(saved: list[str], now: list[str]) -> list[str]:
    if len(saved) != len(now):
        gone, new = ([c for c in a if c not in set(b)] for a, b in ((saved, now), (now, saved)))
        return [f"{len(saved)} classes have become {len(now)} ({_listed(new, gone)})"]
    renamed = [f"class {i} was {a!r}, is {b!r}" for i, (a, b) in enumerate(zip(saved, now, strict=True)) if a != b]
    return renamed[:SHOWN] + [f"{len(renamed) - SHOWN} other classes, too"] * (len(renamed) > SHOWN)


def _changes(split: str, saved: dict[str, Any], now: dict[str, Any]) -> str:
    if saved[split]["hash"] != now[split]["hash"]:
        before, here = _names(saved[split]), _names(now[split])
        gone, new = (sorted(set(a) - set(b)) for a, b in ((before, here), (here, before)))
        what = _listed(new, gone) or "another order"
        return f"{len(before)} images of {split} have become {len(here)} ({what})"
    return f"the annotations of {split} are others" if saved[split]["annotations"] != now[split]["annotations"] else ""


def _names(split: dict[str, Any]) -> list[str]:
    text = zlib.decompress(split["names"].numpy().tobytes()).decode(errors="surrogateescape")
    return text.split("\0")[:-1]


def _listed(new: list[str], gone: list[str]) -> str:
    texts = []
    for kind, names in (("new", new), ("gone", gone)):
        more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
        texts += [f"{len(names)} {kind}: {', '.join(map(repr, names[:SHOWN]))}{more}"] * bool(names)
    return "; ".join(texts)
