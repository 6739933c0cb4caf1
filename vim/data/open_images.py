"""From the name of a data set to its images, by what is there."""

import re
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HTTPError  # of whichever library the hub's client uses

from .config import EvalDataConfig
from .errors import DataError, reason
from .folder import ImageFolder
from .labelled_images import LabelledImages
from .tar_shards import TarImages

HUB = "hf://datasets/"


def open_images(data: EvalDataConfig, split: str, window: int = 1) -> LabelledImages:
    """The images of one split of data.root.

    They are a folder tree root/<split>/<class>/*, or shards, .tar or .parquet: root/<split>/*, root/<split>-*,
    root/*-<split>-* or root/data/<split>-*. Parquet shards may lie at any place that fsspec reaches.

    Args:
        window: Parquet shards that are wanted at a time, and must find room together.

    Raises: DataError for a split that is missing, damaged, or there in more than one form.
    """
    try:
        root = _at_one_commit(data.root)
        fs, folder = fsspec.url_to_fs(root)
        shards = _find_shards(fs, folder, split)
        found = [Path(name).name for name in _names(fs, folder)]
    except (OSError, ValueError, ImportError, HTTPError) as error:
        raise DataError(f"cannot open data.root {data.root}: {reason(error)}") from error
    local = isinstance(fs, LocalFileSystem)
    tree = Path(folder, split)
    classes = local and tree.is_dir() and any(p.is_dir() and p.name[0] != "." for p in tree.iterdir())
    forms = [f"{tree}/<class>"] * classes + list(shards)
    if len(forms) > 1:
        raise DataError(f"split {split!r} is there more than once: {' and '.join(forms)}; leave one of them in {root}")
    if local and not shards:
        return ImageFolder(data.root, split)
    if not shards:
        raise DataError(
            f"no Parquet shards of split {split!r} in {root}: want {split}-*.parquet, found "
            f"{', '.join(sorted(found)) or 'nothing'}; data.root may name a folder below"
        )
    [(path, files)] = shards.items()
    if path.endswith(".parquet"):
        try:
            from .parquet_shards import ParquetImages  # only here: an extra
        except ModuleNotFoundError as error:
            raise DataError(f"Parquet shards need pyarrow: pip install 'vim-mamba[features]' ({error})") from error
        urls = [fs.unstrip_protocol(file) for file in files]
        return ParquetImages(urls, fs.unstrip_protocol(path), window, data.cache_gib)
    if not local:
        raise DataError(f"tar shards must lie on a local disk, for single images are read from them; copy {path} there")
    return TarImages([Path(file) for file in files], Path(folder), path)


def _find_shards(fs: fsspec.AbstractFileSystem, folder: str, split: str) -> dict[str, list[str]]:
    """Shards of a split, in order, by a pattern that says where they are."""
    named = rf"(.+-)?{re.escape(split)}(-.+)?"
    places = ((f"{folder}/{split}", ".+", "*"), (folder, named, f"{split}*"), (f"{folder}/data", named, f"{split}*"))
    found = {}
    for kind in ("tar", "parquet"):
        for place, stem, shown in places:
            want = re.compile(rf"(?!\.){stem}\.{kind}")
            if files := sorted(name for name in _names(fs, place) if want.fullmatch(Path(name).name)):
                found[f"{place}/{shown}.{kind}"] = files
    return found


def _names(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    return fs.ls(folder, detail=False) if fs.isdir(folder) else []


def _at_one_commit(root: str) -> str:
    """For a data set on the hub the same place in its present commit: it may change while a run goes on."""
    if not root.startswith(HUB):
        return root
    where: Any = HfFileSystem().resolve_path(root)
    commit = HfApi().repo_info(where.repo_id, repo_type=where.repo_type, revision=where.revision).sha
    return f"{HUB}{where.repo_id}@{commit}/{where.path_in_repo}".rstrip("/")
