"""Which backend runs: by name, or the fastest one that the tensors' device allows."""

import functools
import importlib.util
import logging
import os
from typing import NoReturn

import torch
from torch.autograd import forward_ad

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


def takes_triton(device: torch.device) -> bool:
    """Whether to run a Triton kernel where there are ATen's operators too, which compilers and transforms know."""
    return not torch.compiler.is_compiling() and not _transformed() and resolve("auto", device) == "triton"


def under_transforms(backend: str) -> str:
    """`backend`; under a transform of torch.func or a forward-mode derivative "reference" for "auto".

    The operators have a backward and nothing else, and would lose a tangent without a word.

    Raises: RuntimeError for a named backend.
    """
    if backend == "reference" or not _transformed():
        return backend
    if backend != "auto":
        raise RuntimeError(f"backend {backend!r} {_NO_TRANSFORM}")
    if not torch.compiler.is_compiling():  # which cannot trace a log
        _log_reference()
    return "reference"


def refuse_transform(*args) -> NoReturn:
    """The rule of an operator where it has none."""
    raise RuntimeError(f"an operator of vim_kernels {_NO_TRANSFORM}")


def check_no_tangents() -> None:
    """Raise where an operator itself is called in forward mode: it does not see whether its tensors have tangents."""
    if forward_ad._current_level >= 0:
        refuse_transform()


_NO_TRANSFORM = (
    "has first derivatives in reverse mode alone and no rules for vmap: take them by torch.func (jvp, vmap, grad, "
    "jacrev, hessian) with backend='auto', or anyhow with backend='reference'"
)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def _log_reference() -> None:
    _log.warning("backend 'reference', a plain loop, under a transform of torch.func or in forward mode")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
