"""Training that begins with smaller images: a model that takes several sizes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vim.console.errors import ConfigError
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model_at
from vim.timm_models.timm_model import TimmModel


def create_model_of_sizes(
    config: ModelConfig, num_classes: int, img_size: int | None
) -> tuple[TimmModel, dict[str, Any]]:
    """`create_model_at` of a model that takes images of several sizes, if it can.

    Returns: the model, and its arguments of timm.create_model.
    """
    dynamic = replace(config, kwargs={"dynamic_img_size": True} | config.kwargs)
    try:
        return create_model_at(dynamic, num_classes, img_size)
    except ConfigError as error:
        if "'dynamic_img_size'" not in str(error):
            raise
        return create_model_at(config, num_classes, img_size)  # convolutions take any size, and no such argument


def check_sizes(model: nn.Module, name: str, input_size: tuple[int, int, int], sizes: Iterable[int]) -> None:
    """Raise ConfigError unless the model takes square images of these edges, and the full size is square and larger.

    Args:
        name: of the model.
        input_size: (C, H, W), the full size.
    """
    channels, height, width = input_size
    device, training = next(model.parameters()).device, model.training
    model.eval()
    for size in sizes:
        if height != width or size >= height:
            raise ConfigError(
                f"data.progressive is for square images that grow to their full size, {height} x {width} pixels; they "
                f"cannot begin with {size}"
            )
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, size, size, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{name} does not take images of {size} pixels, as data.progressive wants: {error}; choose other "
                "sizes, or a model that takes several"
            ) from error
    model.train(training)
