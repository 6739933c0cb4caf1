"""Finds the block of a model where values stop being finite."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"(.*?\.\d+)(\.|$)")  # up to the first number: blocks.3, stages.0, backbone.body.blocks.3


def block_of(parameter: str) -> str:
    """Name of a parameter's block: up to its first number; without a number, the top-level module."""
    numbered = _BLOCK.match(parameter)
    return numbered[1] if numbered else parameter.split(".")[0]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Gradient norm of each block, in the order of the model."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = parameter.grad.double().norm()
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded
            squares[block_of(name)] = squares.get(block_of(name), 0.0) + norm.item() ** 2
    return {block: math.sqrt(square) if math.isfinite(square) else square for block, square in squares.items()}


def largest_activations(model: nn.Module, forward: Callable[[], Any]) -> dict[str, float]:
    """Largest absolute output of each block, in the order of the forward pass; NaN if any output is NaN.

    Args:
        forward: runs the model.
    """
    blocks = {block_of(name) for name, _ in model.named_parameters()}
    largest: dict[str, float] = {}

    def note(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            peaks = torch.tensor([t.detach().abs().max().item() for t in _tensors(output) if t.numel()] or [0.0])
            largest[block] = torch.maximum(peaks.max(), torch.tensor(largest.get(block, 0.0))).item()

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if name in blocks]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def first_not_finite(values: dict[str, float]) -> str:
    """Part of a message: the first block whose value is not finite, or the largest finite value."""
    for block, value in values.items():
        if not math.isfinite(value):
            return f"first in {block} ({value})"
    block = max(values, key=values.__getitem__, default="")
    return f"finite in all blocks, largest in {block} ({values[block]:.3g})" if values else "unknown"


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
