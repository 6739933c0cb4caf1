"""Models by timm's factory, from a configuration."""

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
    """A timm model with the weights that the configuration names; `weights_from` tells which.

    Args:
        config: the model; its grad_checkpointing and compile are not applied here.
        num_classes: of the data set; None keeps the model's own.
        section: what stands before the names of the tool's options.

    Raises: ConfigError for a name, a keyword or a file that does not exist, and weights that do not fit; RunError for a
        damaged file.
    """
    kwargs = dict(config.kwargs)
    if num_classes is not None and kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ConfigError(
            f"{section}kwargs.num_classes is {kwargs['num_classes']}, the data set has {num_classes} classes; leave it "
            "out"
        )
    if "checkpoint_path" in kwargs:  # timm would load it past the rules here
        raise ConfigError(f"{section}kwargs.checkpoint_path is not taken; name the file as {section}checkpoint")
    if config.checkpoint is not None:
        check_file(Path(config.checkpoint))
    name = timm_name(config.name)
    remedy = f"give weights of this model, with the {section}kwargs that they were trained with"
    loading = TimmLoading(config.name, config.checkpoint, remedy)
    pretrained = takes_weights(config)
    try:
        with loading.in_place(), _quick_without_network(name, pretrained and config.checkpoint is None):
            model = cast(TimmModel, timm.create_model(name, pretrained=pretrained, **kwargs))
    except (ConfigError, RunError):
        raise
    except TypeError as error:
        raise ConfigError(f"{section}kwargs do not fit {config.name}: {one_line(error)}") from error
    except OSError as error:
        instead = "local-dir:FOLDER with its files" if ":" in name else f"weights as a file: --{section}checkpoint FILE"
        why = one_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            why = "the hub cannot be reached, and its cache here has not all files"
        raise ConfigError(f"cannot fetch {config.name}: {why}; without a network give {instead}") from error
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # timm has models of each kind
        if str(error).startswith("No pretrained weights exist"):
            why = "has no released weights; name a checkpoint or a run folder"
            raise ConfigError(f"{config.name} {why}") from error
        values = ", ".join(f"{key}: {value}" for key, value in kwargs.items())
        given = f" with {section}kwargs {{{values}}}" if kwargs else ""
        raise ConfigError(f"cannot make {config.name}{given}: {one_line(error)}") from error
    if num_classes is not None:
        model.pretrained_cfg.pop("label_names", None)  # of the data that the weights are from
    model.loaded_weights = loading.loaded
    return model


def create_model_at(
    config: ModelConfig, num_classes: int | None, img_size: int | None
) -> tuple[TimmModel, dict[str, Any]]:
    """`create_model` of a model for images of img_size pixels to the edge, where it wants to know; None: its own.

    Returns: the model, and its arguments of timm.create_model.
    """
    if img_size is not None and "img_size" not in config.kwargs:
        sized = replace(config, kwargs=config.kwargs | {"img_size": img_size})
        try:
            return create_model(sized, num_classes), sized.kwargs
        except ConfigError as error:
            if "'img_size'" not in str(error):
                raise  # convolutions take any size, and have no such argument
    return create_model(config, num_classes), config.kwargs


def takes_weights(config: ModelConfig) -> bool:
    """Whether a model starts from weights: those of a folder or of a repository come along unless they are refused."""
    if config.checkpoint is not None:
        return True
    return ":" in timm_name(config.name) if config.pretrained is None else config.pretrained


def load_model(source: LoadedModelConfig, section: str = "", needs_head: bool = True) -> TimmModel:
    """A timm model with its own classes, and weights from the checkpoint, or else its released ones or its folder's.

    Args:
        section: what stands before the names of the tool's options.
        needs_head: refuse weights that have no classifier for the model's classes: it would answer at random.

    Raises: as `create_model`.
    """
    checkpoint = source.checkpoint
    config = ModelConfig(source.model, pretrained=checkpoint is None, checkpoint=checkpoint, kwargs=source.kwargs)
    model = create_model(config, None, section)
    loaded = model.loaded_weights
    if needs_head and loaded is not None and loaded.new_head:
        raise ConfigError(
            f"{loaded.source} has no classifier for {source.model} ({'; '.join(loaded.changes)}): it would answer at "
            f"random; set {section}kwargs.num_classes to the classes that the weights were trained on"
        )
    return model


def weights_from(model: nn.Module) -> str | None:
    """Where the weights of a created model are from, how many, and what is new; None for random ones."""
    loaded = getattr(model, "loaded_weights", None)
    return None if loaded is None else str(loaded)


def label_names(model: TimmModel) -> list[str] | None:
    """Names of the model's classes, which run folders keep; None where the weights come without."""
    return model.pretrained_cfg.get("label_names")


def enable_grad_checkpointing(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # timm has models of both kinds
        raise ConfigError(f"{name} has no gradient checkpointing; leave it out") from error


@contextmanager
def _quick_without_network(name: str, wanted: bool) -> Iterator[None]:
    """Where the hub cannot be reached, let its client look into its cache alone: it would try again for a minute."""
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
