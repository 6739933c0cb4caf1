"""Models by timm's factory, from a configuration."""

import copy
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import nn

from vim.data import EvalDataConfig

from .checkpoint import load_weights
from .config import LoadedModelConfig, ModelConfig
from .errors import ConfigError, did_you_mean


def create_model(config: ModelConfig, num_classes: int | None) -> nn.Module:
    """A timm model with the weights that the configuration names.

    Args:
        config: the model; its grad_checkpointing and compile are not applied here.
        num_classes: of the data set; None keeps the model's own.

    Raises: ConfigError for a name, a keyword or a file that does not exist.
    """
    kwargs = dict(config.kwargs)
    if num_classes is not None and kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ConfigError(
            f"model.kwargs.num_classes is {kwargs['num_classes']}, the data set has {num_classes} classes; leave it out"
        )
    if config.checkpoint is not None:
        kwargs["pretrained_cfg_overlay"] = _weights_from(config.checkpoint, config.name)
    pretrained = config.pretrained or config.checkpoint is not None
    try:
        model = timm.create_model(timm_name(config.name), pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ConfigError(f"model.kwargs do not fit {config.name}: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith("No pretrained weights exist"):
            raise
        raise ConfigError(f"{config.name} has no released weights; name a checkpoint or a run folder") from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg.pop("state_dict", None)  # it would go into the model's config.json
    return model


def load_model(source: LoadedModelConfig) -> nn.Module:
    """A timm model with its own classes, and weights from the checkpoint, or else its released ones or its folder's.

    Raises: as `create_model`.
    """
    checkpoint = source.checkpoint
    config = ModelConfig(source.model, pretrained=checkpoint is None, checkpoint=checkpoint, kwargs=source.kwargs)
    return create_model(config, num_classes=None)


def label_names(model: nn.Module) -> list[str] | None:
    """Names of the model's classes, which run folders keep; None where the weights come without."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return cfg.get("label_names")


def enable_grad_checkpointing(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # timm has models of both kinds
        raise ConfigError(f"{name} has no gradient checkpointing; leave it out") from error


def timm_name(name: str) -> str:
    """The name for timm.create_model; a run folder may be given as its path.

    Raises: ConfigError for a model that timm does not have.
    """
    if (Path(name) / "config.json").is_file():
        return f"local-dir:{name}"
    if ":" in name or timm.is_model(name):
        return name
    hint = did_you_mean(name, timm.list_models(), "see timm.list_models()")
    raise ConfigError(f"no model {name!r} in timm, and no run folder of that name{hint}")


def resolve_input(model: nn.Module, model_kwargs: dict[str, Any], data: EvalDataConfig) -> dict[str, Any]:
    """How images become the model's input: timm's data_config, with input_size (C, H, W), mean, std, interpolation,
    crop_pct and crop_mode. What `data` leaves open comes from the model; some of timm's have a crop of their own for a
    larger size to test at."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = cfg["input_size"]
    channels = model_kwargs.get("in_chans", channels)
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


def at_size(model: nn.Module, config: LoadedModelConfig, size: int | None) -> nn.Module:
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
            model.set_input_size(img_size=(size, size))  # type: ignore[operator]
        except (AssertionError, RuntimeError, ValueError) as error:  # timm has models of each kind
            raise ConfigError(f"{config.model} cannot take images of {size} x {size} pixels: {error}") from error
    elif model.pretrained_cfg["fixed_input_size"]:  # type: ignore[index]
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


def _weights_from(checkpoint: str, name: str) -> dict[str, Any]:
    """A pretrained_cfg_overlay that makes timm load the file as it loads released weights: through the model's filter,
    and with a new head where the class counts differ. So timm must know the file's class count."""
    path = Path(checkpoint)
    if not path.exists():
        raise ConfigError(f"no file {checkpoint} to load weights from")
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classifier = (cfg and cfg.classifier) or "head"
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    weights = load_weights(path) if path.is_dir() else load_state_dict(checkpoint)
    head = weights.get(f"{classifier}.weight")
    where = {"state_dict": weights} if path.is_dir() else {"file": checkpoint}
    # (custom_load: timm would read some models' weights as of another framework.)
    return {"source": "", "custom_load": False, "num_classes": 0 if head is None else head.shape[0], **where}
