"""Speed and memory of timm models beside each other: images a second of inference and of a training step."""

import gc
import importlib.metadata
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from vim.console.errors import ConfigError, InterruptedRunError, RunError
from vim.console.progress import Progress
from vim.files import whole_file, write_json
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model_at, enable_grad_checkpointing
from vim.timm_models.name import timm_name
from vim.timm_models.precision import DTYPES, Precision

from .benchmark_config import BenchmarkConfig, Contender, Workload
from .plots import contender_name, plot_benchmark, workload_name

CLASSES = 1000
WARM_UP_STEPS = 3  # what a CUDA graph asks for before its capture; also lets compilation and autotuning happen
LEARNING_RATE = 1e-5  # small: labels are random, and weights must stay finite over thousands of updates

MEASURED = ("images_per_second", "min", "max", "peak_mib", "reserved_mib", "setup_seconds", "error")

Step = Callable[[], Tensor]  # gives logits (inference) or the loss (training)
BuildStep = Callable[[Contender, Workload, Precision, torch.device], Step]


def benchmark(config: BenchmarkConfig, build: BuildStep | None = None) -> dict[str, Any]:
    """Measure every model on every workload; write benchmark.json after each, benchmark.png at the end.

    Contenders do not take turns. Each is built, timed over all rounds and freed before the next one, so that its peak
    memory is that of the run that was timed, and nothing of another model is in it. The price: a slow spell of the
    machine hits one contender alone; the spread of the rounds shows it.

    Args:
        build: makes the step to time; None for `build_step`, a classifier's.

    Returns: the content of benchmark.json. Row: model, options, mode, img_size, batch_size; images_per_second (median
        of the rounds), min, max; peak_mib and reserved_mib, most memory of tensors and of torch's allocator with
        set-up included, null on the CPU; setup_seconds, from nothing to warmed up; error, null or "out of memory".
    Raises: ConfigError before anything runs; RunError for a contender that fails by anything but lack of memory.
    """
    device = _device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    results_file, plot_file = folder / "benchmark.json", folder / "benchmark.png"
    plot_file.unlink(missing_ok=True)  # that of an earlier benchmark must not lie beside this one's numbers
    results = _about(config, device)
    write_json(results, results_file)
    progress = Progress()
    progress.line(f"{results['device']}, {config.precision}, {results['versions']}")
    plan = config.plan()
    with progress.bar("benchmark", len(plan)) as advance:
        for workload, contender in plan:
            row: dict[str, Any] = {
                "model": contender.model,
                "options": list(contender.options),
                "mode": workload.mode,
                "img_size": workload.img_size,
                "batch_size": workload.batch_size,
                **dict.fromkeys(MEASURED),
            }
            try:
                row |= measure(contender, workload, config, device, build)
            except KeyboardInterrupt:
                done = f"{len(results['rows'])} of {len(plan)} measurements are in {results_file}"
                raise InterruptedRunError(f"interrupted at {contender}, {workload_name(row)}; {done}") from None
            except Exception as error:
                row["error"] = "out of memory" if _out_of_memory(error) else f"{type(error).__name__}: {error}"
                if row["error"] != "out of memory" and not isinstance(error, ConfigError):
                    traceback.print_exc()
            # Behind `except`: before its end, the error's traceback holds the tensors of the contender.
            results["rows"].append(row)
            write_json(results, results_file)
            if row["error"] not in (None, "out of memory"):
                failed = f"{contender} failed at {workload_name(row)}: {row['error']}"
                raise RunError(f"{failed}; results so far: {results_file}")
            left = _free(contender, device)
            progress.line(f"{workload_name(row)}: {contender}  {_in_words(row)}")
            if left > 1:
                progress.line(f"{left:.0f} MiB outlive {contender}, and count in the peaks of those behind it")
            advance(str(contender))
    try:
        with whole_file(plot_file) as path:
            plot_benchmark(results, path)
        progress.line(f"results: {results_file}\nplot: {plot_file}")
    except ModuleNotFoundError as error:
        progress.line(f"results: {results_file}\nno plot: {error}; pip install matplotlib")
    return results


def measure(
    contender: Contender,
    workload: Workload,
    config: BenchmarkConfig,
    device: torch.device,
    build: BuildStep | None = None,
) -> dict[str, float | None]:
    """Build a contender, time it, and read its peak memory. Its tensors are garbage afterwards.

    Raises: RunError if logits or loss are not finite.
    """
    cuda = device.type == "cuda"
    if cuda:
        # Before the model exists, and read after the timing: weights, optimizer state and activations count, and so do
        # allocations during a capture, which is when a graph gets its memory; a replay allocates nothing.
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    step = (build or build_step)(contender, workload, config.precision, device)
    for _ in range(WARM_UP_STEPS):
        output = step()
    if not output.isfinite().all():  # a wrong model has no speed; this also waits for the GPU
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
    """Seconds that `steps` steps take, launches from Python included."""
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
    """The step to time, on random images and labels that lie on the device."""
    torch.manual_seed(0)  # the same images for all
    batch, size, train = workload.batch_size, workload.img_size, workload.mode == "train"
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    model = create_contender(contender, size).to(device)
    graph = "graph" in contender.options
    model.train(train)
    forward = torch.compile(model) if "compile" in contender.options else model

    def autocast() -> torch.autocast:
        # A cached cast from before a capture would be missing in the graph, which must cast the weights itself.
        return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=not graph)

    if train:
        # On the CPU too, fused is fastest. capturable: the count of updates lives on the GPU.
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=graph)

        def step() -> Tensor:
            with autocast():
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # none is left when a capture begins: it allocates its own
            return loss.detach()
    else:
        # Inference mode spares eager operators some bookkeeping; compiled and captured steps have no use for it.
        no_gradients = torch.no_grad if forward is not model or graph else torch.inference_mode

        def step() -> Tensor:
            with no_gradients(), autocast():
                return forward(images)

    return capture(step) if graph else step


def create_contender(contender: Contender, img_size: int) -> nn.Module:
    """The timm model with random weights, at this image size if it has one to choose.

    Raises: ConfigError for a model that cannot be made, and `checkpoint` and `materialised` where it has no such thing.
    """
    model, _ = create_model_at(ModelConfig(contender.model, pretrained=False), CLASSES, img_size)
    if "checkpoint" in contender.options:
        enable_grad_checkpointing(model, contender.model)
    if "materialised" in contender.options:
        materialise_attention(model, contender.model)
    return model


def materialise_attention(model: nn.Module, name: str) -> None:
    """Make the model's attention do without flash kernels; ConfigError if it has none that would use them."""
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not attentions:
        raise ConfigError(f"{name} has no attention with a fused form; leave out +materialised")
    for attention in attentions:
        attention.fused_attn = False  # type: ignore[assignment]


def capture(step: Step) -> Step:
    """The step as one CUDA graph; each call replays it, on the same inputs, into the same output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Lazy initialisation, compilation and the optimizer's state belong before the capture, and not on the default
    # stream: autograd runs a backward pass on the stream that its forward pass ran on.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    # The graph works in the memory of the images, labels and weights that the step holds.
    replay.step = step  # type: ignore[attr-defined]
    return replay


def benchmark_table(results: dict[str, Any]) -> Table:
    """The content of benchmark.json as a table, with a block for each workload.

    A ratio is to the first contender of the block.
    """
    title = f"{results['device']}, {results['config']['precision']}, torch {results['versions']['torch']}"
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for column in ("images/s", "(min - max)", "ratio", "peak MiB"):
        table.add_column(column, justify="right")
    for name, block in groupby(results["rows"], workload_name):
        rows = list(block)
        table.add_section()
        table.add_row(name, style="bold")
        first = rows[0]["images_per_second"]
        for row in rows:
            name, speed = contender_name(row), row["images_per_second"]
            if row["error"]:
                table.add_row(name, row["error"])
                continue
            ratio = f"{speed / first:.2f}" if first else "-"
            peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            spread = f"({_rounded(row['min'])} - {_rounded(row['max'])})"
            table.add_row(name, _rounded(speed), spread, ratio, peak)
    return table


def _device(config: BenchmarkConfig) -> torch.device:
    """Where to run; ConfigError for models that do not exist or cannot run there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device cuda: torch finds no CUDA device here; choose cpu or auto")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    for contender in map(Contender.parse, config.models):
        timm_name(contender.model)
        if "graph" in contender.options and device.type != "cuda":
            raise ConfigError(f"{contender}: a CUDA graph needs a GPU, and this runs on the CPU; leave out +graph")
    return device


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
    """Whether lack of memory is behind an error; the end of a capture, or a compiler, can put its own in front."""
    while error is not None:
        text = str(error).lower()
        lacking = "out of memory" in text or "can't allocate memory" in text  # cuda libraries; torch's CPU allocator
        if lacking or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(contender: Contender, device: torch.device) -> float:
    """Give back all memory of a contender that is garbage by now, so that none of it counts for the next.

    Returns: MiB that are allocated on the GPU nevertheless.
    """
    if "compile" in contender.options:
        torch.compiler.reset()
    gc.collect()  # modules and graphs are cycles
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    # torch keeps a workspace of some 32 MiB for each stream that has multiplied matrices; each capture has a stream.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device) / 2**20


def _rounded(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _in_words(row: dict[str, Any]) -> str:
    if row["error"]:
        return row["error"]
    peak = "" if row["peak_mib"] is None else f"  {row['peak_mib']:,.0f} MiB"
    return f"{_rounded(row['images_per_second'])} images/s{peak}  set-up {row['setup_seconds']:.0f} s"
