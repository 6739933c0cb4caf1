"""Which backend runs: by name, or the fastest one that the tensors' device allows."""

import functools
import importlib.util
import logging
import os

import torch

from . import cpu

BACKENDS = ("triton", "cpu", "torch", "reference")

_log = logging.getLogger("vim_kernels")


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, fastest first. May compile the `cpu` backend."""
    return tuple(name for name in BACKENDS if unavailable(name) is None)


def check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run on this machine; None if it can."""
    if backend == "cpu":
        return cpu.load_error()
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (torch.cuda.is_available() or _triton_interprets()):
        return "there is no GPU"
    return None


def resolve(backend: str, device: torch.device) -> str:
    """The backend that runs tensors on `device`: the named one, or for "auto" the fastest.

    Raises: RuntimeError if a named backend cannot run here.
    """
    if backend == "auto":
        return _fastest(device.type)
    if (reason := unavailable(backend)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}; available: {available_backends()}")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' takes CPU tensors, got tensors on {device}; use backend='auto'")
    if backend == "triton" and device.type != "cuda" and not _triton_interprets():
        raise RuntimeError(f"backend 'triton' takes CUDA tensors, got tensors on {device}; use backend='auto'")
    return backend


@functools.cache
def _fastest(device_type: str) -> str:
    wanted = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "torch")
    reason = unavailable(wanted)
    if reason is None:
        _log.info("backend %r for tensors on %s", wanted, device_type)
        return wanted
    _log.warning("backend 'torch' for tensors on %s: the faster %r cannot run here: %s", device_type, wanted, reason)
    return "torch"


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
