"""How images become the input of a model."""

import copy
from typing import Any

from timm.data import resolve_data_config

from vim.console.errors import ConfigError
from vim.data import EvalDataConfig
from vim.data.decode import IMAGE_MODES

from .config import LoadedModelConfig
from .timm_model import TimmModel


def resolve_input(model: TimmModel, model_kwargs: dict[str, Any], data: EvalDataConfig) -> dict[str, Any]:
    """How images become the model's input: timm's data_config, with input_size (C, H, W), mean, std, interpolation,
    crop_pct and crop_mode. What `data` leaves open comes from the model; some of timm's have a crop of their own for a
    larger size to test at.

    Raises: ConfigError for a model that images do not have the channels for.
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
    """Raise ConfigError for a model that keeps its size, if images have another.

    Args:
        name, kwargs: of the model. data_config: of `resolve_input`.
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
    """The model for images of size x size pixels: itself where it takes any size or has this one, else a copy with its
    position tables resampled. None: its own size.

    Args:
        config: that the model was loaded from.

    Raises: ConfigError for a model that keeps its size, or cannot take this one.
    """
    own = resolve_input(model, config.kwargs, EvalDataConfig())["input_size"][1:]
    if size is None or own == (size, size):
        return model
    if hasattr(model, "set_input_size"):
        model = copy.deepcopy(model)
        try:
            model.set_input_size(img_size=(size, size))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm has models of each kind
            raise ConfigError(f"{config.model} cannot take images of {size} x {size} pixels: {error}") from error
    elif model.pretrained_cfg["fixed_input_size"]:
        raise ConfigError(
            f"{config.model} takes images of {own[0]} x {own[1]} pixels and cannot change to {size}; some models can "
            f"when they are created: try kwargs.img_size"
        )
    return model


def _per_channel(name: str, given: tuple[float, ...] | None, default: tuple[float, ...], channels: int) -> tuple:
    if given is None:
        # A grey image takes the mean of the colours' statistics.
        return default if len(default) == channels else (sum(default) / len(default),) * channels
    if len(given) != channels:
        raise ConfigError(f"data.{name} needs one value for each of {channels} channels, got {given}")
    return given
