"""From a checkpoint to a state dict that a model loads: unwrapped, under native names, at the model's sizes."""

import logging
from typing import Any, Protocol

from timm.layers import to_2tuple
from torch import Tensor

from . import official
from .patch_embed import Grid, Size
from .position_table import GRID, TableModel, check_table, fit_table, patches_of

_logger = logging.getLogger(__name__)
EMA_WARNING = (
    "official weights came without their training state. From checkpoint_path= or timm's load_checkpoint they are the "
    "EMA if the file has one, but the accuracy of %s was reported for its other weights; to load those from a file use "
    "pretrained=True, pretrained_cfg_overlay={'file': ...}"
)


class PretrainedModel(TableModel, Protocol):
    """What loading reads from a model."""

    pretrained_cfg: dict[str, Any]
    pretrained_model_args: dict[str, Any]

    def to_native(self, official: dict[str, Tensor]) -> dict[str, Tensor]: ...


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: PretrainedModel, img_size: Size | None = None
) -> dict[str, Tensor]:
    """Convert a checkpoint for `model`.

    Takes training states and state dicts, official and native ones, with or without a head, with keys in any order.
    Of a training state it takes the weights that the model's pretrained cfg asks for, see `vim.models.official`.
    A model without class tokens drops those of the checkpoint and their entries in the position table. A single class
    entry of an official table is then taken to be in the middle, as in all released files.

    Args:
        img_size: size of the images that the checkpoint's position table is for. Needed if they are not square and the
            checkpoint has no `pos_embed_grid`: one of another library, or an old one.

    Raises: ValueError for a checkpoint of another model, with other class tokens, or a position table of an unknown
        grid.
    """
    weights = _native(state_dict, model)
    return fit_table(weights, model, None if img_size is None else _table_grid(weights, model, img_size))


def filter_released(state_dict: dict[str, Any], model: PretrainedModel) -> dict[str, Tensor]:
    """`checkpoint_filter_fn` for weights that timm loads by a pretrained cfg, which may tell the size of the images."""
    cfg, arguments = model.pretrained_cfg, model.pretrained_model_args
    weights, grid = _native(official.reload_file(state_dict, cfg), model), None
    # A folder's configuration says nothing about a file that replaces its weights.
    if cfg.get("source") in ("local-dir", "hf-hub") or not arguments:
        grid = _table_grid(weights, model, arguments.get("img_size") or cfg["input_size"][-2:])
        # The weights know better: a configuration may name the size of another model.
        if GRID in weights or patches_of(weights) != grid[0] * grid[1]:
            grid = None
    return fit_table(weights, model, grid)


def before_loading(model: PretrainedModel, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Load-state-dict pre-hook: convert official weights in place, and refuse a position table of another grid.

    It also catches a grid with the same number of patches, which load_state_dict would accept. It warns about official
    weights that may be the EMA, see `vim.models.official`.
    """
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not official.is_official(own):
        check_table(own, model)
        return
    if official.may_be_ema(model.pretrained_cfg):
        _logger.warning(EMA_WARNING, model.pretrained_cfg.get("architecture"))
    for key in own:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in checkpoint_filter_fn(own, model).items()})


def _native(state_dict: dict[str, Any], model: PretrainedModel) -> dict[str, Tensor]:
    """The weights of a checkpoint under native names."""
    weights = official.select_weights(state_dict, model.pretrained_cfg)
    return model.to_native(weights) if official.is_official(weights) else dict(weights)


def _table_grid(weights: dict[str, Tensor], model: PretrainedModel, img_size: Size) -> Grid:
    """The grid of images of `img_size` in the checkpoint's patches."""
    filters = weights.get("patch_embed.proj.weight")
    patch_size = model.patch_embed.patch_size if filters is None else (filters.shape[-2], filters.shape[-1])
    return model.patch_embed.grid_of(to_2tuple(img_size), patch_size)
