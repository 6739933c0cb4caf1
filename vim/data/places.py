"""From a path or an address to the images there."""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HTTPError  # of whichever library the hub's client uses

from .errors import DataError, reason
from .folder import read_class_tree, read_tree
from .image_files import find_images, report_left_out
from .lists import LIST_SUFFIXES, read_list
from .local_images import CLASS_NAMES, LocalImages
from .names import plain_name
from .sources import ImageSource
from .tar_shards import read_labelled_tar, read_tar

HUB = "hf://datasets/"
PLACES = (
    "give a folder, a list (.txt, .tsv), a .tar or .parquet file, a pattern such as data/train-*.parquet, "
    "or hf://datasets/<organisation>/<name>"
)


def open_images(where: str | Path) -> ImageSource:
    """The images at a place, with labels if it has any.

    Args:
        where: one of these.
            A folder of images at any depth; classes are labels if every path is <class>/<image>.
            A list (.txt, .tsv): a path per line, relative to the list, and optionally a tab and a label.
            Tar shards: a .tar file, a folder of them, or a pattern such as train-*.tar. <key>.cls in a shard is the
            label of <key>.jpg; classnames.txt in the shards' folder, or the one above, has the names of the classes.
            Parquet shards: a .parquet file, a folder of them or a pattern, on this machine or at a URL that fsspec
            knows, as hf://datasets/<organisation>/<name>[@<revision>][/<folder, file or pattern>].

    Raises: DataError for a place that is missing, empty or damaged.
    """
    if "://" in str(where):
        return _open_url(str(where))
    path = Path(where).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        pattern = "*" in path.name and path.parent.is_dir()
        files = [p for p in _visible(path.parent) if fnmatchcase(p.name, path.name)] if pattern else []
        if not files:
            raise DataError(f"no images at {path}: it does not exist; {PLACES}")
    elif path.suffix in LIST_SUFFIXES:
        return read_list(path)
    else:
        files = [path]
    kinds = {file.suffix for file in files}
    if kinds == {".tar"}:
        return read_tar(files, path, _names_near(path.parent))
    if kinds == {".parquet"}:
        return _parquet([str(file.absolute()) for file in files], str(path), labelled=False)
    raise DataError(f"{path} is neither a folder, a list ({', '.join(LIST_SUFFIXES)}) nor a .tar or .parquet file")


def open_split(root: str | Path, split: str, window: int = 1, cache_gib: float | None = None) -> ImageSource:
    """The images of one split of a data set, all with labels.

    They are one of these:
        A folder tree root/<split>/<class>/*.
        Shards, .tar or .parquet: root/<split>/*, root/<split>-*, root/*-<split>-* or root/data/<split>-*.
        Without those, a list root/<split>.txt or root/<split>.tsv: a path per line, relative to the list, a tab and a
        label. classnames.txt in root has the names of the classes of tar shards and lists.

    Args:
        root: folder of the data set; for Parquet shards also a URL that fsspec knows.
        window: number of Parquet shards in use at a time; the cache must hold them.
        cache_gib: GiB of disk space for fetched Parquet shards; None for no limit.

    Raises: DataError for a split that is missing, damaged, or there in more than one form.
    """
    fs, folder, pinned = _connect(str(root), f"data.root {root}")
    local = isinstance(fs, LocalFileSystem)
    try:
        shards = _find_shards(fs, folder, split)
        found = [Path(name).name for name in _names(fs, folder)]
    except (OSError, ValueError, HTTPError) as error:
        raise DataError(f"cannot open data.root {root}: {reason(error)}") from error
    tree = Path(folder, split)
    classes = local and tree.is_dir() and any(p.is_dir() and p.name[0] != "." for p in tree.iterdir())
    forms = [f"{tree}/<class>"] * classes + list(shards)
    lists = []
    if local and not forms:  # many trees come with other lists of this name
        lists = [Path(folder, f"{split}{suffix}") for suffix in LIST_SUFFIXES if f"{split}{suffix}" in found]
        forms = [str(file) for file in lists]
    if len(forms) > 1:
        raise DataError(
            f"split {split!r} is there more than once: {' and '.join(forms)}; leave one of them in {pinned}"
        )
    if lists:
        return read_list(lists[0], labelled=True)
    if local and not shards:
        return class_tree(root, split)
    if not shards:
        raise DataError(
            f"no Parquet shards of split {split!r} in {pinned}: want {split}-*.parquet, found "
            f"{', '.join(sorted(found)) or 'nothing'}; data.root may name a folder below"
        )
    [(path, files)] = shards.items()
    if path.endswith(".parquet"):
        urls = [fs.unstrip_protocol(file) for file in files]
        return _parquet(urls, fs.unstrip_protocol(path), window, cache_gib)
    if not local:
        raise DataError(f"tar shards must be on a local disk, to read single images from them; copy {path} there")
    return read_labelled_tar([Path(file) for file in files], path, Path(folder, CLASS_NAMES))


def class_tree(root: str | Path, split: str) -> LocalImages:
    """The images of a folder tree root/<split>/<class>/<image>.

    Raises: DataError for a folder that is missing, holds no images, or does not have this form.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"no data set folder {root}; set data.root to a folder with {split}/<class>/<image> in it")
    if not (root / split).is_dir():
        found = ", ".join(sorted(plain_name(p.name) for p in root.iterdir() if p.is_dir())) or "no folders"
        raise DataError(
            f"no split {split!r} in {root}: want the folder {root / split}, found {found}; "
            f"nor are there shards {split}-*.tar or {split}-*.parquet, or a list {split}.txt or {split}.tsv"
        )
    return read_class_tree(root / split)


def _open_folder(folder: Path) -> ImageSource:
    files = _visible(folder)
    tars, parquets = ([file for file in files if file.suffix == kind] for kind in (".tar", ".parquet"))
    if tars:
        others = [path.name for path in sorted(folder.iterdir()) if path not in {*tars, folder / CLASS_NAMES}]
        return read_tar(tars, folder, _names_near(folder), others)
    if parquets and not find_images(folder)[0]:  # a tree may have Parquet files of another kind
        source = _parquet([str(file.absolute()) for file in parquets], str(folder), labelled=False)
        report_left_out(folder, [path.name for path in sorted(folder.iterdir()) if path not in parquets])
        return source
    return read_tree(folder)


def _open_url(where: str) -> ImageSource:
    fs, place, pinned = _connect(where, f"images {where}")
    try:
        folder, name = (place, "*") if fs.isdir(place) else (place.rpartition("/")[::2])
        found = _names(fs, folder)
    except (OSError, ValueError, HTTPError) as error:
        raise DataError(f"cannot open images {where}: {reason(error)}") from error
    files = sorted(file for file in found if fnmatchcase(Path(file).name, name) and file.endswith(".parquet"))
    if not files:
        names = ", ".join(sorted(Path(file).name for file in found)) or "nothing"
        raise DataError(
            f"no Parquet shards at {pinned}: want a .parquet file, a folder of them or a pattern such as "
            f"train-*.parquet, found {names}"
        )
    return _parquet([fs.unstrip_protocol(file) for file in files], pinned, labelled=False)


def _parquet(
    urls: list[str], path: str, window: int = 1, cache_gib: float | None = None, labelled: bool = True
) -> ImageSource:
    try:
        from .parquet_shards import ParquetImages  # only here: an extra
    except ModuleNotFoundError as error:
        raise DataError(f"Parquet shards need pyarrow: pip install 'vim-mamba[features]' ({error})") from error
    return ParquetImages(urls, path, window, cache_gib, labelled)


def _visible(folder: Path) -> list[Path]:
    """Files of a folder, without hidden ones, by name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _names_near(folder: Path) -> Path | None:
    """The file with names of classes in a folder of shards, or in the folder above it."""
    folder = folder.absolute()
    return next((path for path in (folder / CLASS_NAMES, folder.parent / CLASS_NAMES) if path.is_file()), None)


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


def _connect(where: str, what: str) -> tuple[fsspec.AbstractFileSystem, str, str]:
    """File system of a path or URL, the path in it, and the path or URL at a fixed commit."""
    try:
        pinned = _at_one_commit(where)
        return *fsspec.url_to_fs(pinned), pinned
    except (OSError, ValueError, ImportError, HTTPError) as error:
        raise DataError(f"cannot open {what}: {reason(error)}") from error


def _at_one_commit(where: str) -> str:
    """A place on the hub at its present commit, since the data set may change during a run. Other places stay."""
    if not where.startswith(HUB):
        return where
    place: Any = HfFileSystem().resolve_path(where)
    commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    return f"{HUB}{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")
