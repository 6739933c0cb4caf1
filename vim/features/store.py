"""The folder of an export: shards of rows, and manifest.json, which describes them."""

import importlib.util
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vim.data import DataError
from vim.data.errors import reason
from vim.files import whole_file, write_json

MANIFEST = "manifest.json"
SUFFIX = {"parquet": ".parquet", "npz": ".npz", "safetensors": ".safetensors"}
NO_LABEL = -1
# Manifest entries that `load` relies on, and their types.
ENTRIES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("rows", "rows_per_shard", "shards"), int),
    **dict.fromkeys(("format", "images", "model", "weights_sha256"), str),
    **dict.fromkeys(("columns", "preprocessing"), dict),
    "pools": list,
    "blocks": (list, type(None)),
    "l2": bool,
}
# Errors that the format readers raise for a damaged file.
DAMAGED = (OSError, ValueError, TypeError, LookupError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass
class Features:
    """Rows of an export, in the order of its images.

    columns: name -> (rows, D), or (rows, P, D) for maps, float16 or float32.
    index: (rows,), positions in the source. labels: (rows,), positions in `classes`, -1 for images without a label.
    paths: as `plain_name` writes them.
    """

    columns: dict[str, np.ndarray]
    index: np.ndarray
    labels: np.ndarray
    paths: list[str]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    @property
    def classes(self) -> list[str]:
        """Class names in label order; classes without a name have their number.

        Raises: DataError for an export by an earlier version, which did not store them.
        """
        if "classes" not in self.manifest:
            where = self.manifest["images"]
            raise DataError(
                f"the features of {where} are by an earlier version and have no class names; export them again"
            )
        return self.manifest["classes"]


def shard_file(folder: Path, number: int, file_format: str) -> Path:
    return folder / f"features-{number:05d}{SUFFIX[file_format]}"


def rows_of(shard: int, manifest: dict[str, Any]) -> range:
    first = shard * manifest["rows_per_shard"]
    return range(first, min(first + manifest["rows_per_shard"], manifest["rows"]))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: DataError if the folder holds no export, or its manifest is damaged."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no features in {folder}: {file} is missing") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged: {reason(error)}; export the features again") from error
    if wrong := _wrong_entry(manifest):
        raise DataError(f"{file} is damaged: {wrong}; export the features again")
    return manifest


def _wrong_entry(manifest: Any) -> str | None:
    """The first wrong entry of a manifest, for a message."""
    if not isinstance(manifest, dict):
        return f"it holds {type(manifest).__name__}, not a mapping"
    for key, kind in ENTRIES.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key} is {manifest.get(key)!r}"
    if manifest["format"] not in SUFFIX:
        return f"format is {manifest['format']!r}"
    rows, rows_per_shard, shards = (manifest[key] for key in ("rows", "rows_per_shard", "shards"))
    if rows < 1 or rows_per_shard < 1 or shards != -(-rows // rows_per_shard):
        return f"{rows} rows in {shards} shards of {rows_per_shard}"
    pools, blocks = manifest["pools"], manifest["blocks"]
    wanted = pools if blocks is None else [f"block{block}.{pool}" for block in blocks for pool in pools]
    if not wanted or list(manifest["columns"]) != wanted:
        return f"columns {list(manifest['columns'])} of pools {pools} and blocks {blocks}"
    for name, shape in manifest["columns"].items():
        if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
            return f"the shape of {name} is {shape!r}"
    classes = manifest.get("classes", [])  # missing in exports by earlier versions
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return f"classes is {classes!r}"
    return None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(manifest, folder / MANIFEST)


def write_shard(file: Path, rows: Features, file_format: str) -> None:
    """Write a shard atomically. The same rows give the same bytes."""
    with whole_file(file) as path:
        {"parquet": _write_parquet, "npz": _write_npz, "safetensors": _write_safetensors}[file_format](path, rows)


def load(folder: str | Path) -> Features:
    """Read an export.

    Raises: DataError for a folder without an export, and for an unfinished one.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    check_format(manifest["format"])
    files = [shard_file(folder, i, manifest["format"]) for i in range(manifest["shards"])]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"the export in {folder} is not finished: {len(missing)} of {len(files)} shards are missing, "
                        f"first {missing[0]}; run it again to continue")  # fmt: skip
    parts = [_read(file, number, manifest) for number, file in enumerate(files)]
    return Features(
        {name: np.concatenate([part.columns[name] for part in parts]) for name in manifest["columns"]},
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [path for part in parts for path in part.paths],
        manifest,
    )


def check_format(file_format: str) -> None:
    """Raise DataError if the library of a format is not installed."""
    if file_format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise DataError("features in Parquet need pyarrow: pip install 'vim-mamba[features]', or export to npz")


def _read(file: Path, number: int, manifest: dict[str, Any]) -> Features:
    """Raises: DataError for a shard that is damaged or does not match the manifest."""
    read = {"parquet": _read_parquet, "npz": _read_npz, "safetensors": _read_safetensors}[manifest["format"]]
    rows = rows_of(number, manifest)
    try:
        part = read(file, manifest)
        shapes = {name: part.columns[name].shape for name in manifest["columns"]}
        wanted = {name: (len(rows), *shape) for name, shape in manifest["columns"].items()}
        if shapes != wanted or len(part.paths) != len(rows) or part.index.tolist() != list(rows):
            raise ValueError(f"it does not hold rows {rows.start} to {rows.stop - 1}, of {wanted}")
        highest = len(manifest["classes"]) - 1 if "classes" in manifest else part.labels.max()
        if part.labels.min() < NO_LABEL or part.labels.max() > highest:
            raise ValueError("it has labels without a class")
    except DAMAGED as error:
        raise DataError(f"{file} is damaged: {reason(error)}; remove it, and run the export again") from error
    return part


def _write_parquet(path: Path, rows: Features) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        "index": pa.array(rows.index),
        "path": pa.array(rows.paths, pa.string()),
        "label": pa.array(rows.labels, mask=rows.labels == NO_LABEL),
    }
    for name, values in rows.columns.items():
        # Maps are stored flat; the manifest has their shapes.
        flat = np.ascontiguousarray(values).reshape(len(values), -1)
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    # Features do not compress, and column statistics of them are of no use.
    pq.write_table(pa.table(arrays), path, compression="none", use_dictionary=False, write_statistics=False)


def _read_parquet(file: Path, manifest: dict[str, Any]) -> Features:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def features(name: str) -> np.ndarray:
        values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(table.num_rows, *manifest["columns"][name])

    try:
        table = pq.read_table(file, memory_map=True).combine_chunks()
        return Features(
            {name: features(name) for name in manifest["columns"]},
            table["index"].to_numpy(),
            table["label"].combine_chunks().fill_null(NO_LABEL).to_numpy(zero_copy_only=False),
            table["path"].to_pylist(),
            manifest,
        )
    except pa.ArrowException as error:
        raise ValueError(error) from error


def _write_npz(path: Path, rows: Features) -> None:
    arrays = {"index": rows.index, "label": rows.labels, "path": np.array(rows.paths), **rows.columns}
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in arrays.items():
            # Not numpy.savez: it writes the time, and no two exports would be equal.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(values), allow_pickle=False)


def _read_npz(file: Path, manifest: dict[str, Any]) -> Features:
    with np.load(file, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in manifest["columns"]}
        return Features(columns, arrays["index"], arrays["label"], arrays["path"].tolist(), manifest)


def _write_safetensors(path: Path, rows: Features) -> None:
    from safetensors.numpy import save_file

    arrays = {"index": rows.index, "label": rows.labels, **rows.columns}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, metadata={"path": json.dumps(rows.paths)})


def _read_safetensors(file: Path, manifest: dict[str, Any]) -> Features:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as archive:
            columns = {name: archive.get_tensor(name) for name in manifest["columns"]}
            paths = json.loads(archive.metadata()["path"])
            return Features(columns, archive.get_tensor("index"), archive.get_tensor("label"), paths, manifest)
    except SafetensorError as error:
        raise ValueError(error) from error
