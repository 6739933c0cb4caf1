"""What a run reports: a line per epoch, and summary.json."""

import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vim.console.environment import device_name, versions

from .state import TrainingState


def epoch_line(state: TrainingState, epochs: int, results: str, device: torch.device) -> str:
    """The last epoch in one line: losses, results, speed, peak memory of the main process so far, and time left."""
    record = state.history[-1]
    rate = record["images_per_second"]
    left = timedelta(seconds=round(record["seconds"] * (epochs - state.epoch)))
    peak = peak_memory_mib(device)
    memory = "" if peak is None else f"peak {peak:,.0f} MiB  "
    skipped = f"({record['skipped']} non-finite updates skipped)  " if record["skipped"] else ""
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  train loss {record['train_loss']:.3f}  {skipped}"
        f"{results}  lr {record['lr']:.1e}  {rate:.{0 if rate >= 10 else 1}f} images/s  {memory}{left} left"
    )


def summarise(state: TrainingState, seed: int, device: torch.device) -> dict[str, Any]:
    """The part of summary.json that every kind of run has."""
    history, metric = state.history, state.metric
    return {
        "parameters": sum(p.numel() for p in state.model.parameters()),
        f"best_{metric}": state.score(state.best()),
        "best_epoch": state.best()["epoch"],
        "epochs": len(history),
        "updates": state.update,
        "skipped_updates": sum(record["skipped"] for record in history),
        "bad_images": len(state.bad_images),
        "train_seconds": sum(record["seconds"] for record in history),
        "images_per_second": len(history) / sum(1 / record["images_per_second"] for record in history),
        "data_wait": sum(record["data_wait"] for record in history) / len(history),
        "peak_memory_mib": peak_memory_mib(device),
        "device": device_name(device),
        "seed": seed,
        "versions": versions(),
    }


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory of this process: tensors on the GPU, else its whole memory; None on Windows without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    # Linux: getrusage would also count the program that started this one.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) / 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
