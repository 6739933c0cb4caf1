"""What results depend on besides configuration and data: versions, device, revision."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("vim-mamba", "torch", "torchvision", "timm", "accelerate", "numpy")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def git_revision() -> str | None:
    """Commit of this package's clone, with -dirty if files are changed; None outside of a clone or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
