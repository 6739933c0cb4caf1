"""Export the features of all images to shards. The number of processes does not change the files."""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vim.console.environment import versions
from vim.console.errors import InterruptedRunError, RunError
from vim.console.interruption import Interruption, interruptible
from vim.console.progress import Progress
from vim.data import EvalDataConfig, ImageSource, Transform, eval_transform
from vim.data.loaders import batches_of, leave_signals_to_the_parent
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.create import load_model, weights_from
from vim.timm_models.input import resolve_input

from .config import FeaturesConfig
from .extract import FeatureExtractor, weights_hash
from .store import (
    MANIFEST,
    NO_LABEL,
    Features,
    check_format,
    read_manifest,
    rows_of,
    shard_file,
    write_manifest,
    write_shard,
)

LONGEST_VALUE = 200  # characters of a value in a message


class SourceImages(Dataset[tuple[Tensor, int]]):
    """Images (in_chans, H, W) with their positions in the source."""

    def __init__(self, source: ImageSource, transform: Transform, in_chans: int):
        self.source, self.transform, self.in_chans = source, transform, in_chans

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.source.load(index, self.in_chans)), index


def export_features(config: FeaturesConfig) -> dict[str, Any]:
    """Write manifest.json and shards of rows_per_shard images to config.output, in the source's order.

    One process computes a whole shard, in batches that do not cross its ends, and writes it atomically. So its bytes
    do not depend on the number of processes, and an export that was killed continues with the missing shards.
    All processes call this function.

    Returns: rows, shards, made_now (shards written by this call), seconds, images_per_second over all processes.
    Raises: DataError, ConfigError or RunError, with a message for the user; InterruptedRunError after SIGTERM or
        Ctrl-C.
    """
    with interruptible(lambda: "run it again to continue") as interruption:
        return _export(config, interruption)


def _export(config: FeaturesConfig, interruption: Interruption) -> dict[str, Any]:
    accelerator = create_accelerator(config.precision)
    progress = Progress(accelerator.is_main_process)
    check_format(config.format)
    source = ImageSource(config.images)
    model = load_model(config, needs_head=False).to(accelerator.device)
    progress.line(f"weights: {weights_from(model)}")
    extractor = FeatureExtractor(model, config.pools, config.blocks, config.l2)
    data_config = resolve_input(model, config.kwargs, EvalDataConfig())
    folder = _folder(config)
    manifest = _manifest(config, extractor, data_config, source, accelerator)
    _check_folder(folder, manifest)
    accelerator.wait_for_everyone()  # all processes have checked the folder before one writes
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    missing = [i for i in range(manifest["shards"]) if not shard_file(folder, i, config.format).is_file()]
    accelerator.wait_for_everyone()

    mine = missing[accelerator.process_index :: accelerator.num_processes]
    images = SourceImages(source, eval_transform(data_config), data_config["input_size"][0])
    start = time.perf_counter()
    try:
        with interruption.postponed():
            _export_shards(mine, images, extractor, config, manifest, accelerator, progress, interruption)
    except InterruptedRunError as error:
        done = sum(shard_file(folder, i, config.format).is_file() for i in range(manifest["shards"]))
        raise InterruptedRunError(
            f"{error} with {done} of {manifest['shards']} shards in {folder}", error.number
        ) from None
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - start
    rows = sum(len(rows_of(shard, manifest)) for shard in missing)
    accelerator.end_training()
    return {
        "rows": len(source),
        "shards": manifest["shards"],
        "made_now": len(missing),
        "seconds": seconds,
        "images_per_second": rows / seconds,
    }


def _export_shards(
    shards: list[int],
    images: SourceImages,
    extractor: FeatureExtractor,
    config: FeaturesConfig,
    manifest: dict[str, Any],
    accelerator: Accelerator,
    progress: Progress,
    interruption: Interruption,
) -> None:
    ranges = [rows_of(shard, manifest) for shard in shards]
    batches = [list(rows[i : i + config.batch_size]) for rows in ranges for i in range(0, len(rows), config.batch_size)]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
    )
    parts: list[dict[str, np.ndarray]] = []
    collected, remaining = 0, iter(zip(shards, ranges, strict=True))
    writing: Future | None = None
    with ThreadPoolExecutor(1) as writer, progress.bar("features", len(batches)) as advance:
        shard, rows = next(remaining, (0, range(0)))
        for index, found in _features(loader, extractor, config, accelerator):
            _check_finite(found, index, images.source, config)
            parts.append(found)
            collected += len(index)
            if collected == len(rows):
                if writing is not None:
                    writing.result()  # raises if the disk is full; keeps one shard at most waiting in memory
                file = shard_file(_folder(config), shard, config.format)
                writing = writer.submit(write_shard, file, _joined(parts, rows, images.source), config.format)
                parts, collected = [], 0
                shard, rows = next(remaining, (0, range(0)))
            advance("")
            interruption.obey()  # the writer thread finishes its shard first
        if writing is not None:
            writing.result()


@torch.no_grad()
def _features(
    loader: DataLoader, extractor: FeatureExtractor, config: FeaturesConfig, accelerator: Accelerator
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(positions, columns) of each batch, one batch behind the GPU so that neither CPU nor GPU waits."""
    cuda = accelerator.device.type == "cuda"
    dtype = torch.float16 if config.dtype == "fp16" else torch.float32
    waiting: tuple[list[int], dict[str, Tensor], Any] | None = None

    def fetched() -> tuple[list[int], dict[str, np.ndarray]]:
        assert waiting is not None
        index, columns, ready = waiting
        if ready is not None:
            ready.synchronize()
        return index, {name: t.numpy() for name, t in columns.items()}

    for batch, index in batches_of(loader):
        with accelerator.autocast():
            columns = extractor(batch.to(accelerator.device, non_blocking=True))
        columns = {name: t.to(dtype).to("cpu", non_blocking=True) for name, t in columns.items()}
        ready = None
        if cuda:
            ready = torch.cuda.Event()
            ready.record()
        if waiting is not None:
            yield fetched()
        waiting = index.tolist(), columns, ready
    if waiting is not None:
        yield fetched()


def _check_finite(found: dict[str, np.ndarray], index: list[int], source: ImageSource, config: FeaturesConfig) -> None:
    for name, values in found.items():
        finite = np.isfinite(values.reshape(len(values), -1)).all(1)
        if not finite.all():
            path = source.entries[index[int(np.argmin(finite))]].path
            hint = "; fp16 ends at 65504: choose dtype fp32" if config.dtype == "fp16" else ""
            raise RunError(f"{name} of {path} is not finite{hint}")


def _joined(parts: list[dict[str, np.ndarray]], rows: range, source: ImageSource) -> Features:
    entries = source.entries[rows.start : rows.stop]
    return Features(
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        np.arange(rows.start, rows.stop, dtype=np.int64),
        np.array([NO_LABEL if entry.label is None else entry.label for entry in entries], np.int64),
        [entry.path for entry in entries],
        {},
    )


@torch.no_grad()
def _manifest(
    config: FeaturesConfig,
    extractor: FeatureExtractor,
    data_config: dict[str, Any],
    source: ImageSource,
    accelerator: Accelerator,
) -> dict[str, Any]:
    with accelerator.autocast():
        sample = extractor(torch.zeros(1, *data_config["input_size"], device=accelerator.device))
    names = hashlib.sha256("\n".join(f"{entry.path}\t{entry.label}" for entry in source.entries).encode())
    return {
        "model": config.model,
        "checkpoint": config.checkpoint,
        "kwargs": config.kwargs,
        "weights_sha256": weights_hash(extractor.model),
        "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in data_config.items()},
        "pools": config.pools,
        "blocks": extractor.blocks,
        "l2": config.l2,
        "columns": {name: list(t.shape[1:]) for name, t in sample.items()},
        "dtype": config.dtype,
        "precision": config.precision,
        "batch_size": config.batch_size,  # other sizes may round differently
        "images": config.images,
        "classes": source.classes,  # in label order
        "images_sha256": names.hexdigest(),  # of their paths and labels
        "rows": len(source),
        "rows_per_shard": config.rows_per_shard,
        "shards": -(-len(source) // config.rows_per_shard),
        "format": config.format,
        "device": accelerator.device.type,
        "versions": versions(),
    }


def _check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    if (folder / MANIFEST).is_file():
        saved = read_manifest(folder)
        if changed := [key for key in manifest if saved.get(key) != manifest[key]]:
            was = ", ".join(f"{key} was {_short(saved.get(key))}, is {_short(manifest[key])}" for key in changed)
            raise RunError(f"{folder} holds another export: {was}; choose another --output, or remove it")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and holds no export; choose another --output, or remove it")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."  # e.g. a thousand class names


def _folder(config: FeaturesConfig) -> Path:
    assert config.output is not None
    return Path(config.output).expanduser()
