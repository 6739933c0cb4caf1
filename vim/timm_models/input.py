"""Preprocessing: how images become the input of a model."""

import copy
from typing import Any

from timm.data import resolve_data_config

from vim.console.errors import ConfigError
from vim.data import EvalDataConfig
from vim.data.decode import IMAGE_MODES

from .config import LoadedModelConfig
from .timm_model import TimmModel


def resolve_input(model: TimmModel, model_kwargs: dict[str, Any], data: EvalDataConfig) -> dict[str, Any]:
    """Resolve timm's data_config: input_size (C, H, W), mean, std, interpolation, crop_pct and crop_mode.

    What `data` leaves open comes from the model. Some timm models have another crop_pct at their larger test size.

    Raises: ConfigError if the model takes neither 1 nor 3 channels.
    """
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    channels = model_kwargs.get("in_chans", channels)
    if channels not in IMAGE_MODES:
        raise ConfigError(f"the model takes {channels} channels; images have 1 or 3: set in_chans in its kwargs")
    size = data.img_size or model_kwargs.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    input_size = (channels, height, width)
    return resolve_data_config(
        {
            "input_size": input_size,
            "mean": _per_channel("mean", data.mean, cfg["mean"], channels),
            "std": _per_channel("std", data.std, cfg["std"], channels),
            "crop_pct": data.crop_pct,
            "interpolation": data.interpolation,
        },
        pretrained_cfg=cfg,
        use_test_size=tuple(cfg.get("test_input_size") or ()) == input_size != tuple(cfg["input_size"]),
    )


def check_size(model: TimmModel, name: str, kwargs: dict[str, Any], data_config: dict[str, Any]) -> None:
    """Raise ConfigError if the model has a fixed input size and the images have another.

    Args:
        name, kwargs: of the model. data_config: from `resolve_input`.
    """
    cfg = model.pretrained_cfg
    if not cfg["fixed_input_size"] or kwargs.get("dynamic_img_size") or kwargs.get("strict_img_size") is False:
        return
    size = kwargs.get("img_size") or cfg["input_size"][1:]
    own, (height, width) = (size, size) if isinstance(size, int) else tuple(size), data_config["input_size"][1:]
    if own != (height, width):
        raise ConfigError(
            f"{name} takes images of {own[0]} x {own[1]} pixels, data.img_size makes them {height} x {width}; set one "
            f"size: --model.kwargs '{{img_size: {height}}}', or leave data.img_size out"
        )


def at_size(model: TimmModel, config: LoadedModelConfig, size: int | None) -> TimmModel:
    """The model for images of size x size pixels: itself if it takes them, else a copy with resampled position tables.

    Args:
        config: the model was loaded from it.
        size: in pixels; None keeps the model's own.

    Raises: ConfigError if the model cannot take this size.
    """
    own = resolve_input(model, config.kwargs, EvalDataConfig())["input_size"][1:]
    if size is None or own == (size, size):
        return model
    if hasattr(model, "set_input_size"):
        model = copy.deepcopy(model)
        try:
            model.set_input_size(img_size=(size, size))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm's models raise any of these
            raise ConfigError(f"{config.model} cannot take images of {size} x {size} pixels: {error}") from error
    elif model.pretrained_cfg["fixed_input_size"]:
        raise ConfigError(
            f"{config.model} takes images of {own[0]} x {own[1]} pixels and cannot change to {size}; some models can "
            f"at creation: try kwargs.img_size"
        )
    return model


def _per_channel(name: str, given: tuple[float, ...] | None, default: tuple[float, ...], channels: int) -> tuple:
    if given is None:
        # A grey image takes the mean over the colour channels' statistics.
        return default if len(default) == channels else (sum(default) / len(default),) * channels
    if len(given) != channels:
        raise ConfigError(f"data.{name} needs one value for each of {channels} channels, got {given}")
    return given
