"""The folder of an export: shards of rows, and manifest.json, which says what they hold."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vim.data import DataError
from vim.files import whole_file, write_json

MANIFEST = "manifest.json"
SUFFIX = {"parquet": ".parquet", "npz": ".npz", "safetensors": ".safetensors"}
NO_LABEL = -1


@dataclass
class Features:
    """Rows of an export, in the order of its images.

    columns: name -> (rows, D), or (rows, P, D) for maps, float16 or float32.
    index: (rows,), position among the source's images. labels: (rows,), -1 where an image has none.
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


def shard_file(folder: Path, number: int, file_format: str) -> Path:
    return folder / f"features-{number:05d}{SUFFIX[file_format]}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: DataError if the folder holds no export."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise DataError(f"no features in {folder}: {folder / MANIFEST} is missing") from None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(manifest, folder / MANIFEST)


def write_shard(file: Path, rows: Features, file_format: str) -> None:
    """Write a shard whole or not at all; the same rows give the same bytes."""
    with whole_file(file) as path:
        {"parquet": _write_parquet, "npz": _write_npz, "safetensors": _write_safetensors}[file_format](path, rows)


def load(folder: str | Path) -> Features:
    """Read an export back.

    Raises: DataError for a folder without one, or with an unfinished one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = [shard_file(folder, i, manifest["format"]) for i in range(manifest["shards"])]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"the export in {folder} is not finished: {len(missing)} of {len(files)} shards are missing, "
                        f"{missing[0]} first; run it again to go on")  # fmt: skip
    read = {"parquet": _read_parquet, "npz": _read_npz, "safetensors": _read_safetensors}[manifest["format"]]
    parts = [read(file, manifest) for file in files]
    return Features(
        {name: np.concatenate([part.columns[name] for part in parts]) for name in manifest["columns"]},
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [path for part in parts for path in part.paths],
        manifest,
    )


def _write_parquet(path: Path, rows: Features) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        "index": pa.array(rows.index),
        "path": pa.array(rows.paths, pa.string()),
        "label": pa.array(rows.labels, mask=rows.labels == NO_LABEL),
    }
    for name, values in rows.columns.items():
        # A map is stored flat; the manifest has its shape.
        flat = np.ascontiguousarray(values).reshape(len(values), -1)
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    # Features do not compress; statistics of their columns would say nothing.
    pq.write_table(pa.table(arrays), path, compression="none", use_dictionary=False, write_statistics=False)


def _read_parquet(file: Path, manifest: dict[str, Any]) -> Features:
    import pyarrow.parquet as pq

    table = pq.read_table(file, memory_map=True).combine_chunks()

    def features(name: str) -> np.ndarray:
        values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(table.num_rows, *manifest["columns"][name])

    return Features(
        {name: features(name) for name in manifest["columns"]},
        table["index"].to_numpy(),
        table["label"].combine_chunks().fill_null(NO_LABEL).to_numpy(zero_copy_only=False),
        table["path"].to_pylist(),
        manifest,
    )


def _write_npz(path: Path, rows: Features) -> None:
    arrays = {"index": rows.index, "label": rows.labels, "path": np.array(rows.paths), **rows.columns}
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in arrays.items():
            # numpy's own savez stamps the time of day, and no two exports would be alike.
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
    from safetensors import safe_open

    with safe_open(file, "np") as archive:
        columns = {name: archive.get_tensor(name) for name in manifest["columns"]}
        paths = json.loads(archive.metadata()["path"])
        return Features(columns, archive.get_tensor("index"), archive.get_tensor("label"), paths, manifest)
