"""Shared by all tests: golden fixtures, errors relative to a tensor's largest value, and the `gpu` marker."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden() -> Callable[[str, str], dict[str, Tensor]]:
    """golden(name, prefix): tensors of tests/fixtures/<name>.safetensors whose names begin with prefix, without it."""

    def load(name: str, prefix: str = "") -> dict[str, Tensor]:
        tensors = load_file(FIXTURES / f"{name}.safetensors")
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    return load


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """relative_error(got, want): max abs difference over the max abs of want. NaN where got has one."""

    def error(got: Tensor, want: Tensor) -> float:
        assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
        if want.numel() == 0:
            return 0.0
        want = want.to(got.device, torch.complex128 if want.is_complex() else torch.float64)
        return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()

    return error
