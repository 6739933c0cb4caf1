"""Create timm models from a configuration."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from vim.checkpoint import one_line
from vim.console.errors import ConfigError, RunError

from .config import LoadedModelConfig, ModelConfig
from .name import HUB, timm_name
from .timm_model import TimmModel
from .weights import TimmLoading, check_file

CONNECT_SECONDS = 5


def create_model(config: ModelConfig, num_classes: int | None, section: str = "model.") -> TimmModel:
    """Create a timm model and load its weights; `weights_from` says which.

    Args:
        config: grad_checkpointing and compile are not applied here.
        num_classes: number of classes of the data set; None keeps the model's own.
        section: prefix of the tool's option names, for messages.

    Raises: ConfigError for an unknown name, keyword or file, and weights that do not fit; RunError for a damaged file.
    """
    kwargs = dict(config.kwargs)
    if num_classes is not None and kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ConfigError(
            f"{section}kwargs.num_classes is {kwargs['num_classes']}, the data set has {num_classes} classes; leave it "
            "out"
        )
    if "checkpoint_path" in kwargs:  # timm would load it without our checks
        raise ConfigError(f"{section}kwargs.checkpoint_path is not supported; give the file as {section}checkpoint")
    if config.checkpoint is not None:
        check_file(Path(config.checkpoint))
    name = timm_name(config.name)
    remedy = f"give weights of this model, with the {section}kwargs that they were trained with"
    loading = TimmLoading(config.name, config.checkpoint, remedy)
    pretrained = _takes_weights(config)
    try:
        with loading.in_place(), _offline_if_unreachable(name, pretrained and config.checkpoint is None):
            model = cast(TimmModel, timm.create_model(name, pretrained=pretrained, **kwargs))
    except (ConfigError, RunError):
        raise
    except TypeError as error:
        raise ConfigError(f"{section}kwargs do not fit {config.name}: {one_line(error)}") from error
    except OSError as error:
        instead = "local-dir:FOLDER with its files" if ":" in name else f"weights as a file: --{section}checkpoint FILE"
        why = one_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            why = "the hub cannot be reached, and the local cache is incomplete"
        raise ConfigError(f"cannot fetch {config.name}: {why}; without a network give {instead}") from error
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # timm's models raise any of these
        if str(error).startswith("No pretrained weights exist"):
            why = "has no released weights; name a checkpoint or a run folder"
            raise ConfigError(f"{config.name} {why}") from error
        values = ", ".join(f"{key}: {value}" for key, value in kwargs.items())
        given = f" with {section}kwargs {{{values}}}" if kwargs else ""
        raise ConfigError(f"cannot make {config.name}{given}: {one_line(error)}") from error
    if num_classes is not None:
        model.pretrained_cfg.pop("label_names", None)  # of the data that the weights were trained on
    model.loaded_weights = loading.loaded
    return model


def create_model_at(
    config: ModelConfig, num_classes: int | None, img_size: int | None, section: str = "model."
) -> tuple[TimmModel, dict[str, Any]]:
    """`create_model` for square images of img_size pixels to the edge; None: the model's own size.

    Returns: the model, and its arguments of timm.create_model.
    """
    if img_size is not None and "img_size" not in config.kwargs:
        sized = replace(config, kwargs=config.kwargs | {"img_size": img_size})
        try:
            return create_model(sized, num_classes, section), sized.kwargs
        except ConfigError as error:
            if "'img_size'" not in str(error):  # convolutional networks take any size, and no such argument
                raise
    return create_model(config, num_classes, section), config.kwargs


def load_model(source: LoadedModelConfig, section: str = "", needs_head: bool = True) -> TimmModel:
    """Create a timm model with its own classes, and weights from the checkpoint, its release or its folder.

    Args:
        section: prefix of the tool's option names, for messages.
        needs_head: refuse weights without a classifier for the model's classes.

    Raises: as `create_model`.
    """
    checkpoint = source.checkpoint
    config = ModelConfig(source.model, pretrained=checkpoint is None, checkpoint=checkpoint, kwargs=source.kwargs)
    model = create_model(config, None, section)
    loaded = model.loaded_weights
    if needs_head and loaded is not None and loaded.new_head:
        raise ConfigError(
            f"{loaded.source} has no classifier for {source.model} ({'; '.join(loaded.changes)}): it would answer at "
            f"random; set {section}kwargs.num_classes to the number of classes that the weights were trained on"
        )
    return model


def weights_from(model: nn.Module) -> str | None:
    """Source of a created model's weights, number of tensors and what was adapted; None for random weights."""
    loaded = getattr(model, "loaded_weights", None)
    return None if loaded is None else str(loaded)


def label_names(model: TimmModel) -> list[str] | None:
    """Names of the model's classes, which run folders store; None if the weights come without."""
    return model.pretrained_cfg.get("label_names")


def enable_grad_checkpointing(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # some models have no such method, others refuse
        raise ConfigError(f"{name} has no gradient checkpointing; leave it out") from error


def _takes_weights(config: ModelConfig) -> bool:
    """Whether a model starts from given weights. A folder or repository provides them unless pretrained is False."""
    if config.checkpoint is not None:
        return True
    return ":" in timm_name(config.name) if config.pretrained is None else config.pretrained


@contextmanager
def _offline_if_unreachable(name: str, wanted: bool) -> Iterator[None]:
    """If the hub cannot be reached, let its client use its cache alone: it would retry for a minute."""
    offline = constants.HF_HUB_OFFLINE
    if (wanted or name.startswith(HUB)) and not name.startswith("local-dir:") and not offline and not getproxies():
        address = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((address.hostname or "", address.port or 443), timeout=CONNECT_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
