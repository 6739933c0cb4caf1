"""Compares speed and memory of timm models: inference and training throughput in images/s."""

import gc
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from vim.checkpoint import one_line
from vim.console.errors import ConfigError, InterruptedRunError, RunError
from vim.console.progress import Progress
from vim.files import whole_file, write_json
from vim.timm_models.capture import capture
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model_at, enable_grad_checkpointing
from vim.timm_models.name import timm_name
from vim.timm_models.precision import DTYPES, Precision

from .benchmark_config import BenchmarkConfig, Contender, Workload
from .plots import contender_name, plot_benchmark, workload_name

CLASSES = 1000
WARM_UP_STEPS = 3  # also cover compilation and autotuning
LEARNING_RATE = 1e-5  # small: labels are random, and weights must stay finite over thousands of updates

OUT_OF_MEMORY = "out of memory"
# Options in which the parts of a resumed benchmark may differ.
MAY_CHANGE = {"models", "workloads", "rounds", "seconds", "peer", "top1", "resume", "output"}
MEASURED = ("images_per_second", "min", "max", "peak_mib", "reserved_mib", "setup_seconds", "error")

Step = Callable[[], Tensor]  # returns logits (inference) or the loss (training)
BuildStep = Callable[[Contender, Workload, Precision, torch.device], Step]


def benchmark(config: BenchmarkConfig, build: BuildStep | None = None) -> dict[str, Any]:
    """Measure every model on every workload. Writes benchmark.json after each measurement, benchmark.png at the end.

    Contenders do not take turns: each is built, timed over all rounds and freed before the next one. So its peak memory
    contains nothing of another model. The price: if the machine slows down for a while, one contender alone is slower;
    the spread of its rounds shows it. A model that fails does not stop the others; `check_complete` names it.

    Args:
        build: creates the step to time; None: `build_step`, for classifiers.

    Returns: the content of benchmark.json. Each row has model, options, mode, img_size, batch_size;
        images_per_second (median of the rounds), min, max; peak_mib and reserved_mib, the peak memory of tensors and
        of torch's allocator, set-up included, null on the CPU; setup_seconds, until the end of the warm-up; error,
        null, "out of memory" or why it failed, for example at a size that the model cannot have.
    Raises: ConfigError before anything runs; InterruptedRunError.
    """
    device = _device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    results_file, plot_file = folder / "benchmark.json", folder / "benchmark.png"
    results = _about(config, device)
    if config.resume and results_file.exists():
        results["rows"] = earlier_rows(results, results_file)
    plot_file.unlink(missing_ok=True)  # an earlier plot would not match the new numbers
    write_json(results, results_file)
    progress = Progress()
    progress.line(f"{results['device']}, {config.precision}, {results['versions']}")
    plan = [(workload, contender, _row(workload, contender)) for workload, contender in config.plan()]
    done = {_key(row) for row in results["rows"]}
    left = [entry for entry in plan if _key(entry[2]) not in done]
    with progress.bar("benchmark", len(left)) as advance:
        for workload, contender, row in left:
            try:
                row |= measure(contender, workload, config, device, build)
            except KeyboardInterrupt:
                count = f"{len(results['rows'])} measurements are in {results_file}"
                why = f"interrupted at {contender}, {workload_name(row)}; {count}; --resume true makes the others"
                raise InterruptedRunError(why) from None
            except ConfigError as error:  # the model has no such option, or cannot have this size
                row["error"] = str(error)
            except Exception as error:
                row["error"] = OUT_OF_MEMORY if _out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}"
                if row["error"] != OUT_OF_MEMORY:
                    traceback.print_exc()
            # Outside of `except`: inside, the error's traceback would keep the contender's tensors alive.
            results["rows"].append(row)
            write_json(results, results_file)
            kept = _free(contender, device)
            progress.line(f"{workload_name(row)}: {contender}  {_result_line(row)}")
            if kept > 1:
                progress.line(f"warning: {contender} leaves {kept:.0f} MiB, included in the peaks of later contenders")
            advance(str(contender))
    try:
        with whole_file(plot_file) as path:
            plot_benchmark(results, path)
        progress.line(f"results: {results_file}\nplot: {plot_file}")
    except ModuleNotFoundError as error:
        progress.line(f"results: {results_file}\nno plot: {error}; pip install matplotlib")
    return results


def check_complete(results: dict[str, Any]) -> None:
    """Raise RunError if a model failed for another reason than lack of memory."""
    failed = [row for row in results["rows"] if row["error"] not in (None, OUT_OF_MEMORY)]
    if failed:
        first = f"{contender_name(failed[0])}, {workload_name(failed[0])}: {failed[0]['error']}"
        raise RunError(f"{len(failed)} of {len(results['rows'])} measurements failed, first {first}")


def measure(
    contender: Contender,
    workload: Workload,
    config: BenchmarkConfig,
    device: torch.device,
    build: BuildStep | None = None,
) -> dict[str, float | None]:
    """Build a contender, time it, and read its peak memory. Nothing refers to its tensors afterwards.

    Raises: RunError if logits or loss are not finite.
    """
    cuda = device.type == "cuda"
    if cuda:
        # Reset before the model exists, read after the timing: the peak includes weights, optimizer state, activations,
        # and the memory that a graph gets during its capture; a replay allocates nothing.
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    step = (build or build_step)(contender, workload, config.precision, device)
    for _ in range(WARM_UP_STEPS):
        output = step()
    if not output.isfinite().all():  # no speed for a wrong model; this also waits for the GPU
        raise RunError(f"{'loss' if workload.mode == 'train' else 'logits'} not finite after {WARM_UP_STEPS} steps")
    setup_seconds = time.perf_counter() - start

    steps = 1
    while (seconds := time_steps(step, steps, device)) < config.seconds / 4:
        steps *= 2
    steps = max(1, round(steps * config.seconds / seconds))
    speeds = [workload.batch_size * steps / time_steps(step, steps, device) for _ in range(config.rounds)]
    return {
        "images_per_second": statistics.median(speeds),
        "min": min(speeds),
        "max": max(speeds),
        "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None,
        "reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20 if cuda else None,
        "setup_seconds": setup_seconds,
    }


def time_steps(step: Step, steps: int, device: torch.device) -> float:
    """Seconds for `steps` steps, including launches from Python."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - began


def build_step(contender: Contender, workload: Workload, precision: Precision, device: torch.device) -> Step:
    """Create the step to time, on random images and labels on the device."""
    torch.manual_seed(0)  # the same images for all contenders
    batch, size, train = workload.batch_size, workload.img_size, workload.mode == "train"
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    model = create_contender(contender, size).to(device)
    graph = "graph" in contender.options
    model.train(train)
    forward = torch.compile(model) if "compile" in contender.options else model

    def autocast() -> torch.autocast:
        # A cast that autocast cached before the capture would be missing in the graph.
        return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=not graph)

    if train:
        # fused is fastest, on the CPU too. capturable: keeps the update counter on the GPU.
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=graph)

        def step() -> Tensor:
            with autocast():
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # a capture must allocate the gradients itself
            return loss.detach()
    else:
        # Inference mode saves overhead in eager operators; compiled and captured steps gain nothing.
        no_gradients = torch.no_grad if forward is not model or graph else torch.inference_mode

        def step() -> Tensor:
            with no_gradients(), autocast():
                return forward(images)

    return captured(step) if graph else step


def create_contender(contender: Contender, img_size: int) -> nn.Module:
    """Create the timm model with random weights, for this image size if it takes one.

    Raises: ConfigError if the model cannot be created, or does not support `checkpoint` or `materialised`.
    """
    model, _ = create_model_at(ModelConfig(contender.model, pretrained=False), CLASSES, img_size)
    if "checkpoint" in contender.options:
        enable_grad_checkpointing(model, contender.model)
    if "materialised" in contender.options:
        materialise_attention(model, contender.model)
    return model


def materialise_attention(model: nn.Module, name: str) -> None:
    """Turn off fused (flash) attention in the model; ConfigError if it has none."""
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not attentions:
        raise ConfigError(f"{name} has no fused attention to turn off; leave out +materialised")
    for attention in attentions:
        attention.fused_attn = False  # type: ignore[assignment]


def captured(step: Step) -> Step:
    """The step as one CUDA graph. Each call replays it, on the same inputs, into the same output."""
    replay, output = capture(step)

    def again() -> Tensor:
        replay()
        return output

    # Keep the step alive: the graph uses the memory of its images, labels and weights.
    again.step = step  # type: ignore[attr-defined]
    return again


def benchmark_table(results: dict[str, Any]) -> Table:
    """The content of benchmark.json as a table, with a block per workload.

    Ratios are relative to the fastest row of the configured peer, or to the first row of a block.
    """
    config = results["config"]
    table = Table(title=f"{results['device']}, {config['precision']}, torch {results['versions']['torch']}")
    table.add_column("model", no_wrap=True)
    for column in ("top-1 %", "images/s", "(min - max)", "ratio", "peak MiB"):
        table.add_column(column, justify="right")
    blocks: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        blocks.setdefault(workload_name(row), []).append(row)
    for name, rows in blocks.items():
        table.add_section()
        table.add_row(name, style="bold")
        peers = rows[:1] if config["peer"] is None else [row for row in rows if row["model"] == config["peer"]]
        base = max((row["images_per_second"] or 0 for row in peers), default=0)
        for row in rows:
            top1, speed = config["top1"].get(row["model"]), row["images_per_second"]
            reported = "-" if top1 is None else f"{top1:.1f}"
            if row["error"]:
                table.add_row(contender_name(row), reported, row["error"])
                continue
            ratio = f"{speed / base:.2f}" if base else "-"
            peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            spread = f"({_rounded(row['min'])} - {_rounded(row['max'])})"
            table.add_row(contender_name(row), reported, _rounded(speed), spread, ratio, peak)
    return table


def _device(config: BenchmarkConfig) -> torch.device:
    """The device to run on. Raises ConfigError for models that do not exist or cannot run there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device cuda: torch finds no CUDA device here; choose cpu or auto")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    for name in filter(None, (config.peer, *config.top1)):
        timm_name(name)
    for contender in map(Contender.parse, config.models):
        timm_name(contender.model)
        if "graph" in contender.options and device.type != "cuda":
            raise ConfigError(f"{contender}: a CUDA graph needs a GPU, but this runs on the CPU; leave out +graph")
    return device


def earlier_rows(about: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier part of a benchmark, without those to measure again because they failed.

    Args: about: content of benchmark.json for the new part. path: the earlier benchmark.json.

    Raises: ConfigError for a damaged file, and for measurements that cannot stand beside new ones.
    """
    instead = "choose another output, or leave out --resume"
    try:
        earlier = json.loads(path.read_text())
        found, wanted = (
            {**a["config"], **a["versions"], "device": a["device"], "threads": a["threads"]} for a in (earlier, about)
        )
        rows = [row for row in earlier["rows"] if row["error"] in (None, OUT_OF_MEMORY)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result of this benchmark ({one_line(error)}); {instead}") from error
    for name, value in wanted.items():
        if name not in MAY_CHANGE and found.get(name) != value:
            raise ConfigError(f"{path} was measured with {name} {found.get(name)}, and this run has {value}; {instead}")
    return rows


def _row(workload: Workload, contender: Contender) -> dict[str, Any]:
    """A row of benchmark.json before its measurement."""
    row = {"model": contender.model, "options": list(contender.options), **asdict(workload), **dict.fromkeys(MEASURED)}
    del row["models"]
    return row


def _key(row: dict[str, Any]) -> str:
    return f"{workload_name(row)}: {contender_name(row)}"


def _about(config: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """Content of benchmark.json before the first measurement."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "triton": _version("triton"),
            "vim": _version("vim-mamba"),
        },
        "config": asdict(config),
        "rows": [],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"cpu {platform.machine()}"


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether lack of memory caused an error. A failed capture or a compiler may raise another error from it."""
    while error is not None:
        text = str(error).lower()
        lacking = "out of memory" in text or "can't allocate memory" in text  # CUDA libraries; torch's CPU allocator
        if lacking or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(contender: Contender, device: torch.device) -> float:
    """Free all memory of a contender, so that none of it counts for the next.

    Returns: MiB still allocated on the GPU.
    """
    if "compile" in contender.options:
        torch.compiler.reset()
    gc.collect()  # modules and graphs have reference cycles
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    # torch keeps a workspace of about 32 MiB for each stream that ran a matrix product; each capture has a stream.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device) / 2**20


def _rounded(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _result_line(row: dict[str, Any]) -> str:
    if row["error"]:
        return row["error"]
    peak = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:,.0f} MiB"
    return f"{_rounded(row['images_per_second'])} images/s{peak}  setup {row['setup_seconds']:.0f} s"
