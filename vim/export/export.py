"""Export a model, verify the files against it, and time them."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from vim.console.environment import versions
from vim.console.errors import RunError
from vim.console.output import make_output
from vim.console.progress import Progress
from vim.data import EvalDataConfig, ImageSource, eval_transform
from vim.files import whole_file, write_json
from vim.timm_models.create import label_names, load_model, weights_from
from vim.timm_models.input import resolve_input

from .config import ExportConfig
from .programs import FORMATS, Format, Runner, export_program

TOLERANCE = 1e-4  # fp32; absolute for outputs up to 1, relative to the largest output above


def export_model(config: ExportConfig) -> dict[str, Any]:
    """Write the model to config.output in the chosen formats, and export.json, which describes input and output.

    Each file is loaded and compared with the model on real images. It is kept only if they agree.

    Returns: the content of export.json: input (shape and preprocessing), output (shape and label_names), eager
        milliseconds, and for each format file, bytes, seconds, max_abs_error and milliseconds.
    Raises: DataError, ConfigError, or RunError for a file that differs from the model; with a message for the user.
    """
    progress = Progress()
    model = load_model(config).eval()
    progress.line(f"weights: {weights_from(model)}")
    data_config = resolve_input(model, config.kwargs, EvalDataConfig())
    images, folder = _images(config, data_config), make_output(config.output)
    eager: Runner = torch.inference_mode()(model)
    expected = eager(images)
    report: dict[str, Any] = {
        "model": config.model,
        "kwargs": config.kwargs,
        "input": {"name": "images", "shape": ["batch", *data_config["input_size"]], "dtype": "float32", **data_config},
        "output": {"shape": ["batch", *expected.shape[1:]], "label_names": label_names(model)},
        "threads": config.threads,
        "eager": {"milliseconds": _milliseconds(eager, images, config.threads)},
        "versions": versions(),
    }
    progress.line(f"eager: {_times(report['eager'])}")
    about = folder / "export.json"
    about.unlink(missing_ok=True)  # an old one would describe other files
    for name in config.formats:
        path = folder / FORMATS[name].file
        report[name] = found = _export(FORMATS[name], model, images, expected, path, config.threads)
        progress.line(
            f"{name}: {path}, {found['bytes'] / 1e6:.1f} MB in {found['seconds']:.0f} s, "
            f"largest difference {found['max_abs_error']:.1e}; {_times(found)}"
        )
    write_json(report, about)
    for name in FORMATS.keys() - set(config.formats):
        (folder / FORMATS[name].file).unlink(missing_ok=True)  # from an earlier export
    return report


def _images(config: ExportConfig, data_config: dict[str, Any]) -> Tensor:
    source = ImageSource(config.images)
    transform, in_chans = eval_transform(data_config), data_config["input_size"][0]
    return torch.stack([transform(source.load(i, in_chans)) for i in source.spread(config.batch_size)])


def _export(
    form: Format, model: nn.Module, images: Tensor, expected: Tensor, path: Path, threads: int
) -> dict[str, Any]:
    start = time.perf_counter()
    with whole_file(path) as unfinished:
        form.write(export_program(model, images.shape[1:], loop=form.loop), unfinished)
        seconds = time.perf_counter() - start
        run = form.read(unfinished, threads)
        # Also one image: a program with the example's batch size as a constant would fail.
        error = max(_difference(run(images), expected), _difference(run(images[:1]), expected[:1]))
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not error <= allowed:
            raise RunError(f"{path.name} differs from the model by {error:.1e}, more than {allowed:.1e}; not written")
        size, times = unfinished.stat().st_size, _milliseconds(run, images, threads)
    return {"file": path.name, "bytes": size, "seconds": seconds, "max_abs_error": error, "milliseconds": times}


def _difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def _milliseconds(run: Runner, images: Tensor, threads: int) -> dict[int, float]:
    """Median time of a call by batch size."""
    found = {}
    for batch in sorted({1, len(images)}):
        timer = Timer("run(images)", globals={"run": run, "images": images[:batch]}, num_threads=threads)
        timer.timeit(2)
        found[batch] = timer.blocked_autorange(min_run_time=1.0).median * 1e3
    return found


def _times(record: dict[str, Any]) -> str:
    return ", ".join(f"{batch} images {ms:.1f} ms" for batch, ms in record["milliseconds"].items())
