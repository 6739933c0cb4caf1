"""Image data sets in Parquet shards, as on the Hugging Face hub, on a local disk or wherever fsspec reaches."""

import hashlib
import io
import json
import mmap
import posixpath
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
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
from .names import numbered_classes, plain_name
from .shard_cache import ShardCache, shard_folder
from .sources import Shards

# Usual names of the columns, to choose one if several have the right type.
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")
CONNECTIONS = 16
ROWS = 256  # per batch of the rewritten shard
NO_LABEL = -1  # the package datasets writes it for images without a label, in test sets for example
GIB = 2**30


class Columns(NamedTuple):
    """Names of the columns, and of the classes if the file has them.

    label: None without labels. structures: whether images are structures with `bytes`, or plain bytes.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None
    structures: bool

    @property
    def content(self) -> str:
        """Parquet's path of the image bytes."""
        return f"{self.image}.bytes" if self.structures else self.image


class Shard(NamedTuple):
    """Facts from the footer of a Parquet file.

    content: changes with the file. size: bytes of images and labels. highest: largest label, if classes have no names.
    """

    url: str
    content: str
    rows: int
    size: int
    columns: Columns
    highest: int


class ParquetImages:
    """An `ImageSource` of the rows of Parquet shards.

    Columns are found by type. Images are structures with `bytes`, or bytes. Labels are whole numbers, preferably with
    names of classes. IMAGE_NAMES and LABEL_NAMES decide between several candidates.

    A shard is fetched when its first image is needed, unless that was done before. Parquet has no access to single
    rows, so a shard is rewritten once as an uncompressed Arrow file. All processes of the machine share these files.

    timm reads such data sets with the package datasets. Its hfds downloads and keeps the whole data set before training
    starts. The order of its stream hfids depends on the number of processes, and cannot resume within an epoch.

    Args:
        urls: the files, in order.
        path: place of all files, for messages.
        window: number of shards in use at a time.
        cache_gib: GiB of disk space for fetched shards; None for no limit.
        labelled: require a label for every image. Otherwise labels are optional, and a column of whole numbers counts
            as labels only with names of classes or a name of LABEL_NAMES: it might hold anything.

    Raises: DataError for files that cannot be read, have no column of images or different columns, and for a window
        that exceeds the disk space.
    """

    def __init__(
        self,
        urls: Sequence[str],
        path: str,
        window: int = 1,
        cache_gib: float | None = None,
        labelled: bool = True,
    ):
        self.path, self.window, self.labelled = path, window, labelled
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = [shard for shard in pool.map(lambda url: _read_footer(url, labelled), urls) if shard.rows]
        if not found:
            raise DataError(f"no rows in {path}")
        self.columns = found[0].columns
        for shard in found:
            if shard.columns != self.columns:
                first, other = ([s.columns.image, s.columns.label] for s in (found[0], shard))
                raise DataError(f"{found[0].url} and {shard.url} differ in columns or classes: {first}, {other}")
        self._shards = [shard._replace(columns=self.columns) for shard in found]  # one list of names, not hundreds
        highest = max(shard.highest for shard in self._shards)
        self.classes: list[str] = []
        if self.columns.label is not None:
            self.classes = list(self.columns.classes or numbered_classes(highest, path))
        self._starts = list(accumulate((shard.rows for shard in self._shards), initial=0))
        needed = sum(sorted(shard.size for shard in self._shards)[-window:]) / GIB
        if cache_gib is not None and needed > cache_gib:
            raise DataError(
                f"data.cache_gib {cache_gib} does not hold the {window} shards of {path} that are in use at a time; "
                f"give at least {needed:.3g}, or lower data.window"
            )
        self._cache = ShardCache(shard_folder(), None if cache_gib is None else int(cache_gib * GIB))
        self._open: OrderedDict[int, pa.Table] = OrderedDict()  # least recently opened first
        self._labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self):
        return self.__dict__ | {"_open": OrderedDict(), "_labels": None}  # another process maps its own shards

    @property
    def shards(self) -> Shards:
        return Shards([shard.rows for shard in self._shards], self.fetch)

    def fetch(self, shard: int) -> None:
        """Put a shard into the cache, unless it is there.

        Raises: ShardError if it cannot be fetched.
        """
        self._fetched(self._shards[shard])

    def name(self, index: int) -> str:
        """<shard>/<row>."""
        shard, row = self._place(index)
        return f"{posixpath.basename(self._shards[shard].url)}/{row}"

    def label(self, index: int) -> int | None:
        """Label of a row: from its shard if that is open, otherwise from the label columns of all files, read once.

        Raises: DataError for a label outside the classes, and for a missing one that is required.
        """
        if self.columns.label is None:
            return None
        shard, row = self._place(index)
        if shard in self._open:
            label = self._open[shard]["label"][row].as_py()
        else:
            label = int(self._all_labels()[index])
        if label is not None and 0 <= label < len(self.classes):
            return label
        if not self.labelled and label in (None, NO_LABEL):
            return None
        raise DataError(f"row {self.name(index)} has the label {label}, want 0 to {len(self.classes) - 1}; remove it")

    def load(self, index: int, in_chans: int = 3) -> Image.Image:
        """Image with 1 (grey) or 3 channels.

        Raises: DataError with the name of an image that cannot be read; ShardError if its shard cannot be fetched.
        """
        shard, row = self._place(index)
        content = self._table(shard)["image"][row].as_py()
        if content is None:
            raise DataError(f"row {self.name(index)} has no image bytes; remove it")
        return decode_image(io.BytesIO(content), in_chans, self.name(index))

    def _place(self, index: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _all_labels(self) -> np.ndarray:
        if self._labels is None:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                self._labels = np.concatenate(list(pool.map(_read_labels, self._shards)))
        return self._labels

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


def _read_footer(url: str, labelled: bool) -> Shard:
    with _clear_errors(f"cannot read {url}", DataError):
        fs, path = fsspec.url_to_fs(url)
        with fs.open(path, "rb") as file:
            footer = pq.read_metadata(file)
        info = fs.info(path)
        columns = _find_columns(footer.schema.to_arrow_schema(), url, labelled)
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        taken = [c for group in chunks for c in group if c.path_in_schema in (columns.content, columns.label)]
        highest = 0
        if columns.label is not None and columns.classes is None:
            for chunk in taken:
                if chunk.path_in_schema == columns.label and chunk.num_values:
                    if not chunk.is_stats_set or not chunk.statistics.has_min_max:
                        raise DataError(
                            f"{url}: column {columns.label!r} has neither names of classes nor a highest value"
                        )
                    highest = max(highest, chunk.statistics.max)
        # The hub's blob_id of a file stays the same across revisions of the data set.
        content = info.get("blob_id") or fs.ukey(path)
        return Shard(url, content, footer.num_rows, sum(c.total_uncompressed_size for c in taken), columns, highest)


def _read_labels(shard: Shard) -> np.ndarray:
    """Label column of a file, (rows,) int64, NO_LABEL for missing ones. Reads no images."""
    with _clear_errors(f"cannot read the labels of {shard.url}", ShardError):
        fs, path = fsspec.url_to_fs(shard.url)
        # Without a cache: reading ahead would fetch images.
        with fs.open(path, "rb", cache_type="none") as file:
            column = pq.ParquetFile(file).read([shard.columns.label], use_threads=False).column(0)
        _check_rows(shard, len(column))
        return column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()


def _find_columns(schema: pa.Schema, url: str, labelled: bool) -> Columns:
    classes = _class_names(schema, url)
    structures = [f.name for f in schema if pa.types.is_struct(f.type) and _is_bytes(f.type)]
    plain = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    numbers = [f.name for f in schema if pa.types.is_integer(f.type)]
    image = _choose("images (a structure with bytes, or bytes)", structures or plain, IMAGE_NAMES, schema, url)
    named = [name for name in numbers if name in classes]
    label: str | None
    if labelled:
        label = _choose("labels (whole numbers)", named or numbers, LABEL_NAMES, schema, url)
    elif len(named) == 1:
        label = named[0]
    else:
        label = next((name for name in LABEL_NAMES if name in (named or numbers)), None)
    return Columns(image, label, None if label is None else classes.get(label), bool(structures))


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
    """Names of classes by column, from the notes of Hugging Face's package datasets in the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        # In older versions a list stands for a column of lists, which holds no labels.
        found = {column: f["names"] for column, f in features.items() if isinstance(f, dict) and f.get("names")}
        if wrong := [names for names in found.values() if not isinstance(names, list)]:
            raise TypeError(f"names are {wrong[0]!r}")
        return {column: tuple(plain_name(str(name)) for name in names) for column, names in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{url}: its description by Hugging Face cannot be read ({error!r}); write the file again"
        ) from error


def _rewrite(shard: Shard, path: Path) -> None:
    """Write images and labels of a Parquet file as an Arrow file with access to every row."""
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    columns, rows = shard.columns, 0
    wanted = [columns.content] if columns.label is None else [columns.content, columns.label]
    with fsspec.open(shard.url, "rb") as file, pa.ipc.new_file(path, schema) as arrow:
        # Without threads: data workers are forked, and a forked process does not have the threads of its parent.
        for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=wanted, use_threads=False):
            image = batch[columns.image]
            if columns.structures:
                image = pc.struct_field(image, "bytes")
            label = pa.nulls(len(image)) if columns.label is None else batch[columns.label]
            arrow.write_batch(pa.record_batch([image.cast(pa.binary()), label.cast(pa.int64())], schema=schema))
            rows += len(image)
    _check_rows(shard, rows)


def _check_rows(shard: Shard, rows: int) -> None:
    if rows != shard.rows:
        raise ShardError(f"{shard.url} has {rows} rows now, and had {shard.rows}; start again")


@contextmanager
def _clear_errors(what: str, kind: type[DataError]) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    # (ValueError, KeyError: damaged names are not UTF-8, or occur twice.)
    except (OSError, ValueError, KeyError, pa.ArrowException, HTTPError) as error:
        raise kind(f"{what}: {reason(error)}") from error
