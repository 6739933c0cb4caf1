"""Shared by all tests: golden fixtures, relative errors, and the `gpu` marker."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from shared_failures import pytest_runtest_makereport  # noqa: F401  (the hook)
from torch import Tensor

import vim.layers.bimamba
import vim.layers.mamba
import vim.layers.row_column_mamba
import vim.layers.short_conv
from vim_kernels import available_backends

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden() -> Callable[..., dict[str, Tensor]]:
    """golden(name, prefix): tensors of tests/fixtures/<name>.safetensors whose names start with prefix, stripped."""

    def load(name: str, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
        tensors = load_file(FIXTURES / f"{name}.safetensors", device=device)
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    return load


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """relative_error(got, want): max abs difference divided by the max abs of want. NaN if got has a NaN."""

    def error(got: Tensor, want: Tensor) -> float:
        assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
        if want.numel() == 0:
            return 0.0
        want = want.to(got.device, torch.complex128 if want.is_complex() else torch.float64)
        return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()

    return error


class MixerBackend(NamedTuple):
    device: str
    limit: float  # factor on the golden limits, which are for the CPU


@pytest.fixture(
    params=[
        *(name for name in ("reference", "torch", "cpu") if name in available_backends()),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def mixer_backend(request, monkeypatch) -> Iterator[MixerBackend]:
    """Make all layers call one backend, each in turn. Yields its device and limit."""
    for module, name in (
        (vim.layers.short_conv, "causal_conv1d"),
        (vim.layers.short_conv, "bidirectional_causal_conv1d"),
        (vim.layers.mamba, "selective_scan"),
        (vim.layers.bimamba, "bidirectional_selective_scan"),
        (vim.layers.row_column_mamba, "bidirectional_selective_scan"),
    ):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), backend=request.param))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the patch embedding is a convolution
        yield MixerBackend("cuda", 5) if request.param == "triton" else MixerBackend("cpu", 1)
