"""Position tables of checkpoints: an entry for each class token, then one for each patch, row by row."""

from typing import TYPE_CHECKING

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

if TYPE_CHECKING:
    from .vision_mamba import VisionMamba

Grid = tuple[int, int]
GRID = "pos_embed_grid"  # in a state dict: rows and columns of the table's patches, where they are no square


def fit_table(weights: dict[str, Tensor], model: "VisionMamba", grid: Grid | None = None) -> dict[str, Tensor]:
    """Native weights for `model`, their filters and position table resampled to its sizes.

    Args:
        grid: of the table's patches, where the weights do not say it and they are no square.

    Raises: ValueError for other class tokens, or a grid that cannot be told.
    """
    out = dict(weights)
    if "patch_embed.proj.weight" in out:
        size = list(model.patch_embed.patch_size)
        out["patch_embed.proj.weight"] = resample_patch_embed(out["patch_embed.proj.weight"], size)
    table, noted, tokens, prefix = out.get("pos_embed"), out.pop(GRID, None), _tokens(out), model.num_prefix_tokens
    if prefix == 0:  # a detector's backbone has no use for a classifier's token
        out.pop("cls_token", None)
        table, tokens = None if table is None else table[:, tokens:], 0
    if table is None:
        return out
    if tokens != prefix:
        raise ValueError(
            f"the checkpoint has {tokens} class tokens, a model with class_token={model.class_token!r} has {prefix}; "
            "create it with the checkpoint's class_token"
        )
    old, new = _grid(table.shape[1] - tokens, noted, grid), model.patch_embed.grid_size
    # (timm takes the time to resample what is the same, where it is exported.)
    out["pos_embed"] = table if old == new else resample_abs_pos_embed(table, list(new), list(old), prefix)
    if new[0] != new[1]:
        out[GRID] = torch.tensor(new)
    return out


def check_table(weights: dict[str, Tensor], model: "VisionMamba") -> None:
    """Raise ValueError for native weights whose position table has as many patches as the model's in another grid.
    (Of another number load_state_dict says it.)"""
    table, tokens = weights.get("pos_embed"), _tokens(weights)
    if table is None or table.is_meta or table.shape != model.pos_embed.shape or tokens != model.num_prefix_tokens:
        return
    grid, own = _grid(table.shape[1] - tokens, weights.get(GRID)), model.patch_embed.grid_size
    if grid != own:
        raise ValueError(
            f"the position table is of {grid[0]} x {grid[1]} patches, the model's of {own[0]} x {own[1]}; pass the "
            "weights through checkpoint_filter_fn, which resamples it, or load them at their own img_size and call "
            "set_input_size"
        )


def patches_of(weights: dict[str, Tensor]) -> int:
    """Patches of the position table; 0 without one."""
    return weights["pos_embed"].shape[1] - _tokens(weights) if "pos_embed" in weights else 0


def _tokens(weights: dict[str, Tensor]) -> int:
    return weights["cls_token"].shape[1] if "cls_token" in weights else 0


def _grid(patches: int, noted: Tensor | None, told: Grid | None = None) -> Grid:
    """The grid of a table.

    Args:
        noted: in the weights. told: by the caller.

    Raises: ValueError where neither is there and the patches are no square, or they contradict each other.
    """
    edge = round(patches**0.5)
    known = {"pos_embed_grid": noted if noted is None else tuple(noted.flatten().tolist()), "img_size": told}
    found = {name: grid for name, grid in known.items() if grid is not None} or {"its length": (edge, edge)}
    grid = next(iter(found.values()))
    if any(len(other) != 2 or other[0] * other[1] != patches or other != grid for other in found.values()):
        said = " and ".join(f"{name} says {' x '.join(map(str, other))}" for name, other in found.items())
        raise ValueError(
            f"cannot tell the grid of a position table with {patches} patches: {said}; give checkpoint_filter_fn the "
            "img_size of the images that it is for"
        )
    return grid
