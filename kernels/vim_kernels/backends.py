"""Dispatch: a call runs on the backend it names, or on the fastest one that the tensors' device allows."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NoReturn

import torch
from torch.autograd import forward_ad

from . import cpu

BACKENDS = ("triton", "cpu", "torch", "reference")
TRITON_OR_TORCH = ("triton", "torch")  # the backends of long_conv, rms_norm, swiglu and mamba_block_step
COMPILED_OR_TORCH = ("triton", "cpu", "torch")  # those of ssd

_log = logging.getLogger("vim_kernels")


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, fastest first. May compile the `cpu` backend."""
    return _available(BACKENDS)


def check_name(backend: str, names: tuple[str, ...] = BACKENDS) -> None:
    if backend not in ("auto", *names):
        raise ValueError(f"backend must be one of {('auto', *names)}, got {backend!r}")


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
    """The backend of the scan and the convolution for tensors on `device`: the named one; "auto" takes the fastest.

    Raises: RuntimeError if a named backend cannot run here.
    """
    if backend == "auto":
        return _fastest(device.type)
    _check_runs(backend, device, BACKENDS)
    return backend


def kernels_or_torch(
    operator: str,
    backend: str,
    device: torch.device,
    names: tuple[str, ...] = TRITON_OR_TORCH,
    *,
    limit: Callable[[], str | None] | None = None,
) -> str:
    """The backend of an operator that has kernels and a version in ATen operators.

    "auto" takes "torch" under torch.compile, torch.export, torch.func transforms and forward mode: they can trace and
    differentiate ATen operators only.

    Args:
        names: the backends of the operator.
        limit: returns why Triton's kernels cannot take these tensors, or None if they can. Only called if they may run.

    Raises: ValueError for an unknown name; RuntimeError if a named backend cannot run here.
    """
    if backend == "auto":
        if torch.compiler.is_compiling() or transformed():
            return "torch"
        fastest = _fastest(device.type, operator, names)
        if fastest == "triton" and limit is not None and (reason := limit()) is not None:
            _log_fallback(operator, device.type, reason)
            return "torch"
        return fastest
    check_name(backend, names)
    if backend == "torch":
        return backend
    if torch.compiler.is_compiling():
        raise RuntimeError(f"backend {backend!r} of {operator} cannot be compiled or exported; use backend='auto'")
    if transformed():
        raise RuntimeError(f"backend {backend!r} of {operator} {_NO_TRANSFORM}")
    _check_runs(backend, device, names)
    if backend == "triton" and limit is not None and (reason := limit()) is not None:
        raise RuntimeError(f"backend 'triton' of {operator} cannot run this call: {reason}; use backend='auto'")
    return backend


def under_transforms(backend: str) -> str:
    """`backend`, but "reference" for "auto" under a torch.func transform or in forward mode.

    The registered operators only have a backward: they would drop a tangent silently.

    Raises: RuntimeError for a named backend.
    """
    if backend == "reference" or not transformed():
        return backend
    if backend != "auto":
        raise RuntimeError(f"backend {backend!r} {_NO_TRANSFORM}")
    if not torch.compiler.is_compiling():  # it cannot trace a log call
        _log_reference()
    return "reference"


def refuse_transform(*args) -> NoReturn:
    """Stands in for the vmap rules and double backwards that operators do not have."""
    raise RuntimeError(f"an operator of vim_kernels {_NO_TRANSFORM}")


def check_no_tangents() -> None:
    """Raise if an operator itself is called in forward mode: it cannot see whether its tensors have tangents."""
    if forward_ad._current_level >= 0:
        refuse_transform()


_NO_TRANSFORM = (
    "supports only first derivatives in reverse mode, and no vmap; inside torch.func (jvp, vmap, grad, jacrev, "
    "hessian) use backend='auto', elsewhere backend='reference' (scan, convolution) or 'torch' (other operators)"
)


def _available(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if unavailable(name) is None)


def _check_runs(backend: str, device: torch.device, names: tuple[str, ...]) -> None:
    """Raise RuntimeError unless `backend`, one of `names`, runs tensors on `device`."""
    if (reason := unavailable(backend)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}; available: {_available(names)}")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' takes CPU tensors, got tensors on {device}; use backend='auto'")
    if backend == "triton" and device.type != "cuda" and not _triton_interprets():
        raise RuntimeError(f"backend 'triton' takes CUDA tensors, got tensors on {device}; use backend='auto'")


@functools.cache
def _fastest(device_type: str, operator: str | None = None, names: tuple[str, ...] = BACKENDS) -> str:
    """For the scan and the convolution, or for another operator. Logs once."""
    wanted = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "torch")
    if wanted not in names:
        wanted = "torch"
    reason = unavailable(wanted)
    if reason is None:
        _log.info("backend %r%s for tensors on %s", wanted, f" of {operator}" if operator else "", device_type)
        return wanted
    _log_fallback(operator, device_type, reason, wanted)
    return "torch"


@functools.cache
def _log_fallback(operator: str | None, device_type: str, reason: str, wanted: str = "triton") -> None:
    _log.warning(
        "backend 'torch'%s for tensors on %s: the faster %r cannot run here: %s",
        f" of {operator}" if operator else "",
        device_type,
        wanted,
        reason,
    )


def transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def _log_reference() -> None:
    _log.warning("backend 'reference', a plain Python loop, under a torch.func transform or in forward mode")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
