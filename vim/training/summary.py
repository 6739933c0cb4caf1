"""What a run reports: a line for each epoch, summary.json and plots."""

import importlib.metadata
import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .evaluation import Evaluation
from .plots import plot_confusion, plot_learning_curve
from .state import TrainingState, score

PACKAGES = ("vim-mamba", "torch", "torchvision", "timm", "accelerate", "numpy")


def epoch_line(history: list[dict[str, Any]], epochs: int) -> str:
    """The last epoch in one line, with the time that the rest will take."""
    record = history[-1]
    left = timedelta(seconds=round(record["seconds"] * (epochs - len(history))))
    ema = f"  (averaged weights {record['ema_top1']:.2f})" if "ema_top1" in record else ""
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  train loss {record['train_loss']:.3f}  "
        f"val loss {record['loss']:.3f}  top-1 {record['top1']:.2f} %{ema}  lr {record['lr']:.1e}  "
        f"{record['images_per_second']:.0f} images/s  {left} left"
    )


def summarise(
    config: TrainConfig, state: TrainingState, evaluation: Evaluation, device: torch.device
) -> dict[str, Any]:
    """Content of summary.json: accuracies in percent, of the weights after the last epoch and of the best epoch."""
    history = state.history
    return {
        "model": config.model.name,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "top1": history[-1]["top1"],
        "top5": history[-1]["top5"],
        **{key: history[-1][key] for key in ("ema_top1", "ema_top5") if key in history[-1]},
        "best_top1": score(state.best()),
        "best_epoch": state.best()["epoch"],
        "epochs": len(history),
        "updates": state.update,
        "val_images": evaluation.images,
        "train_seconds": sum(record["seconds"] for record in history),
        "images_per_second": len(history) / sum(1 / record["images_per_second"] for record in history),
        "peak_memory_mib": peak_memory_mib(device),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "seed": config.seed,
        "versions": versions(),
    }


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory that this process had: the tensors' on a GPU, else all of it; None on Windows without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_plots(history: list[dict[str, Any]], confusion: Tensor, classes: list[str], folder: Path) -> str:
    """Write learning_curve.png and confusion_matrix.png.

    Returns: a line that says where they are, or why there are none.
    """
    curve, matrix = folder / "learning_curve.png", folder / "confusion_matrix.png"
    try:
        plot_learning_curve(history, curve)
        plot_confusion(confusion, classes, matrix)
    except ModuleNotFoundError as error:
        return f"no plots: {error}; pip install matplotlib"
    return f"plots: {curve} {matrix}"
