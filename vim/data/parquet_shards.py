"""Image data sets in Parquet shards, as Hugging Face keeps them, on a local disk or wherever fsspec reaches."""

import hashlib
import io
import json
import mmap
import posixpath
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub.errors import HTTPError  # of whichever library the hub's client uses
from PIL import Image

from .decode import decode_image
from .errors import DataError, ShardError, reason
from .labelled_images import Shards
from .names import numbered_classes, plain_name
from .shard_cache import ShardCache, shard_folder

# What they are called in most data sets, for those that have several that could be meant.
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")
CONNECTIONS = 16
ROWS = 256  # in a batch of the rewritten shard
GIB = 2**30


class Columns(NamedTuple):
    """Where image and label are, and the names of the classes, if the file has them.

    structures: True where images are structures with `bytes`, False where they are bytes.
    """

    image: str
    label: str
    classes: tuple[str, ...] | None
    structures: bool

    @property
    def content(self) -> str:
        """Path of the images' bytes, as Parquet has it."""
        return f"{self.image}.bytes" if self.structures else self.image


class Shard(NamedTuple):
    """What the end of a Parquet file tells about it.

    content: changes when the file does.
    size: bytes of images and labels. highest: label, where classes have no names.
    """

    url: str
    content: str
    rows: int
    size: int
    columns: Columns
    highest: int


class ParquetImages:
    """The images of one split in Parquet shards.

    Images are the only column of structures with `bytes`, or of bytes, labels the only one with names of classes, or
    else of whole numbers. Names decide among several, see IMAGE_NAMES and LABEL_NAMES.

    A shard is fetched when its first image is wanted, if not before. Since Parquet has no single rows, it is rewritten
    once, as an uncompressed Arrow file in a folder that all processes of the machine share.

    timm reads such data sets by the package datasets: hfds fetches all of it before it begins and keeps all of it, and
    the stream of hfids comes in an order that depends on the numbers of processes, and has no way back to its midst.

    Args:
        urls: the files, in order.
        path: of all of them, for messages.
        window: shards that are wanted at a time.
        cache_gib: GiB of disk space for fetched shards; None for no limit.

    Raises: DataError for files that cannot be read, differ in their columns or have none for images and labels, and for
        a window that does not fit into the disk space.
    """

    def __init__(self, urls: Sequence[str], path: str, window: int = 1, cache_gib: float | None = None):
        self.path, self.window = path, window
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = [shard for shard in pool.map(_read_end, urls) if shard.rows]
        if not found:
            raise DataError(f"no rows in {path}")
        self.columns = found[0].columns
        for shard in found:
            if shard.columns != self.columns:
                first, other = ([s.columns.image, s.columns.label] for s in (found[0], shard))
                raise DataError(f"{found[0].url} and {shard.url} differ in columns or classes: {first}, {other}")
        self._shards = [shard._replace(columns=self.columns) for shard in found]  # one list of names, not hundreds
        highest = max(shard.highest for shard in self._shards)
        self.classes = list(self.columns.classes or numbered_classes(highest, path))
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        needed = sum(sorted(shard.size for shard in self._shards)[-window:]) / GIB
        if cache_gib is not None and needed > cache_gib:
            raise DataError(
                f"data.cache_gib {cache_gib} does not hold the {window} shards of {path} that are wanted at a time; "
                f"give at least {needed:.3g}, or lower data.window"
            )
        self._cache = ShardCache(shard_folder(), None if cache_gib is None else int(cache_gib * GIB))
        self._open: OrderedDict[int, pa.Table] = OrderedDict()  # least recently opened first

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self):
        return self.__dict__ | {"_open": OrderedDict()}  # another process maps its own

    @property
    def shards(self) -> Shards:
        return Shards([shard.rows for shard in self._shards], self.fetch)

    def fetch(self, shard: int) -> None:
        """Put a shard into the cache, if it is not there.

        Raises: ShardError if it cannot be fetched.
        """
        self._fetched(self._shards[shard])

    def name(self, index: int) -> str:
        """<shard>/<row>."""
        shard, row = self._place(index)
        return f"{posixpath.basename(self._shards[shard].url)}/{row}"

    def load(self, index: int, in_chans: int = 3) -> tuple[Image.Image, int]:
        """Image with so many channels, 1 (grey) or 3, and its label.

        Raises: DataError with the name of an image that cannot be read or has no label; ShardError if its shard cannot
            be fetched.
        """
        shard, row = self._place(index)
        table = self._table(shard)
        content, label = (table[column][row].as_py() for column in ("image", "label"))
        if content is None:
            raise DataError(f"row {self.name(index)} has no image bytes; remove it")
        if label is None or not 0 <= label < len(self.classes):
            raise DataError(
                f"row {self.name(index)} has the label {label}, want 0 to {len(self.classes) - 1}; remove it"
            )
        return decode_image(io.BytesIO(content), in_chans, self.name(index)), label

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _table(self, number: int) -> pa.Table:
        if number not in self._open:
            while len(self._open) >= self.window:
                self._open.popitem(last=False)
            self._open[number] = self._fetched(self._shards[number])
        return self._open[number]

    def _fetched(self, shard: Shard) -> pa.Table:
        key = hashlib.blake2b(repr((shard.content, shard.columns[:2])).encode(), digest_size=16).hexdigest()
        name = f"{posixpath.basename(shard.url).removesuffix('.parquet')}-{key}.arrow"
        with _clear_errors(f"cannot fetch {shard.url} into {self._cache.folder}", ShardError):
            content = self._cache.open(name, lambda path: _rewrite(shard, path))
            try:
                return _table_of(content)
            except pa.ArrowInvalid:  # damaged on this disk
                self._cache.remove(name)
                return _table_of(self._cache.open(name, lambda path: _rewrite(shard, path)))


def _table_of(content: mmap.mmap) -> pa.Table:
    return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content))).read_all()


def _read_end(url: str) -> Shard:
    with _clear_errors(f"cannot read {url}", DataError):
        fs, path = fsspec.url_to_fs(url)
        with fs.open(path, "rb") as file:
            end = pq.read_metadata(file)
        info = fs.info(path)
        columns = _find_columns(end.schema.to_arrow_schema(), url)
        groups = [end.row_group(i) for i in range(end.num_row_groups)]
        chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        taken = [c for group in chunks for c in group if c.path_in_schema in (columns.content, columns.label)]
        highest = 0
        if columns.classes is None:
            for chunk in taken:
                if chunk.path_in_schema == columns.label and chunk.num_values:
                    if not chunk.is_stats_set or not chunk.statistics.has_min_max:
                        raise DataError(
                            f"{url}: column {columns.label!r} has neither names of classes nor a highest value"
                        )
                    highest = max(highest, chunk.statistics.max)
        # The hub's name of a content stays the same in other revisions of the data set.
        content = info.get("blob_id") or fs.ukey(path)
        return Shard(url, content, end.num_rows, sum(c.total_uncompressed_size for c in taken), columns, highest)


def _find_columns(schema: pa.Schema, url: str) -> Columns:
    classes = _class_names(schema, url)
    structures = [f.name for f in schema if pa.types.is_struct(f.type) and _is_bytes(f.type)]
    plain = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    numbers = [f.name for f in schema if pa.types.is_integer(f.type)]
    image = _choose("images (a structure with bytes, or bytes)", structures or plain, IMAGE_NAMES, schema, url)
    named = [name for name in numbers if name in classes]
    label = _choose("labels (whole numbers)", named or numbers, LABEL_NAMES, schema, url)
    return Columns(image, label, classes.get(label), bool(structures))


def _is_bytes(struct: pa.StructType) -> bool:
    index = struct.get_field_index("bytes")
    return index >= 0 and (pa.types.is_binary(struct[index].type) or pa.types.is_large_binary(struct[index].type))


def _choose(kind: str, found: list[str], preferred: Sequence[str], schema: pa.Schema, url: str) -> str:
    if len(found) == 1:
        return found[0]
    for name in preferred:
        if name in found:
            return name
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    which = f"several columns of {kind}: {', '.join(found)}" if found else f"no column of {kind}"
    raise DataError(f"{url} has {which}; want one, or one called {' or '.join(preferred)}. Its columns: {columns}")


def _class_names(schema: pa.Schema, url: str) -> dict[str, tuple[str, ...]]:
    """By column, from what Hugging Face's package datasets notes about it."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        # A list, as of older versions, is a column of lists, which holds no labels.
        found = {column: f["names"] for column, f in features.items() if isinstance(f, dict) and f.get("names")}
        if wrong := [names for names in found.values() if not isinstance(names, list)]:
            raise TypeError(f"names are {wrong[0]!r}")
        return {column: tuple(plain_name(str(name)) for name in names) for column, names in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{url}: its description by Hugging Face cannot be read ({error!r}); write it anew") from error


def _rewrite(shard: Shard, path: Path) -> None:
    """Write images and labels of a Parquet file as an Arrow file that can be read at any row."""
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    with fsspec.open(shard.url, "rb") as file, pa.ipc.new_file(path, schema) as arrow:
        parquet, rows = pq.ParquetFile(file), 0
        wanted = [shard.columns.content, shard.columns.label]
        # Without threads, for loaders are forked from a process that had some.
        for batch in parquet.iter_batches(ROWS, columns=wanted, use_threads=False):
            image = batch[shard.columns.image]
            if shard.columns.structures:
                image = pc.struct_field(image, "bytes")
            arrow.write_batch(
                pa.record_batch([image.cast(pa.binary()), batch[shard.columns.label].cast(pa.int64())], schema=schema)
            )
            rows += len(image)
    if rows != shard.rows:
        raise ShardError(f"{shard.url} has {rows} rows now, and had {shard.rows}; start again")


@contextmanager
def _clear_errors(what: str, kind: type[DataError]) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        pa.ArrowException,
        HTTPError,
    ) as error:  # damaged names are no UTF-8, or there twice
        raise kind(f"{what}: {reason(error)}") from error
