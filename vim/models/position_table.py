"""Position tables of checkpoints: an entry for each class token, then one for each patch, row by row.

Mamba-R's registers have a table of their own, `pos_embed_cls`; then `pos_embed` has entries of patches only.
"""

from typing import Protocol

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from .patch_embed import Grid, PatchEmbed

GRID = "pos_embed_grid"  # in a state dict: rows and columns of the table's patches, if they differ


class TableModel(Protocol):
    """What fitting a table reads from a model."""

    patch_embed: PatchEmbed
    pos_embed: nn.Parameter
    num_prefix_tokens: int
    class_token: str


def fit_table(weights: dict[str, Tensor], model: TableModel, grid: Grid | None = None) -> dict[str, Tensor]:
    """Native weights for `model`, with patch filters and position table resampled to its sizes.

    Args:
        grid: of the table's patches. Needed if it is not square and the weights do not hold it.

    Raises: ValueError for other class tokens, or an unknown grid.
    """
    out = dict(weights)
    if "patch_embed.proj.weight" in out:
        size = list(model.patch_embed.patch_size)
        out["patch_embed.proj.weight"] = resample_patch_embed(out["patch_embed.proj.weight"], size)
    table, saved_grid, tokens = out.get("pos_embed"), out.pop(GRID, None), _tokens(out)
    prefix, entries = model.num_prefix_tokens, _class_entries(out)
    if prefix == 0:  # a detector's backbone has no use for a classifier's token
        out.pop("cls_token", None)
        table, tokens, entries = None if table is None else table[:, entries:], 0, 0
    if table is None:
        return out
    if tokens != prefix:
        raise ValueError(
            f"the checkpoint has {tokens} class tokens, a model with class_token={model.class_token!r} has {prefix}; "
            "create it with the checkpoint's class_token"
        )
    old, new = _grid(table.shape[1] - entries, saved_grid, grid), model.patch_embed.grid_size
    # (During an export timm would resample even to the same size.)
    out["pos_embed"] = table if old == new else resample_abs_pos_embed(table, list(new), list(old), entries)
    if new[0] != new[1]:
        out[GRID] = torch.tensor(new)
    return out


def check_table(weights: dict[str, Tensor], model: TableModel) -> None:
    """Refuse a position table with the model's number of patches in another grid.

    load_state_dict refuses other numbers itself.

    Raises: ValueError.
    """
    table, tokens = weights.get("pos_embed"), _tokens(weights)
    if table is None or table.is_meta or table.shape != model.pos_embed.shape or tokens != model.num_prefix_tokens:
        return
    grid, own = _grid(table.shape[1] - _class_entries(weights), weights.get(GRID)), model.patch_embed.grid_size
    if grid != own:
        raise ValueError(
            f"the position table is of {grid[0]} x {grid[1]} patches, the model's of {own[0]} x {own[1]}; pass the "
            "weights through checkpoint_filter_fn, which resamples it, or load them at their own img_size and call "
            "set_input_size"
        )


def patches_of(weights: dict[str, Tensor]) -> int:
    """Number of patches in the position table; 0 without a table."""
    return weights["pos_embed"].shape[1] - _class_entries(weights) if "pos_embed" in weights else 0


def _tokens(weights: dict[str, Tensor]) -> int:
    return weights["cls_token"].shape[1] if "cls_token" in weights else 0


def _class_entries(weights: dict[str, Tensor]) -> int:
    """Entries of class tokens in the position table."""
    return 0 if "pos_embed_cls" in weights else _tokens(weights)


def _grid(patches: int, saved: Tensor | None, given: Grid | None = None) -> Grid:
    """The grid of a table.

    Args:
        saved: with the weights. given: by the caller.

    Raises: ValueError if both contradict each other, or both are missing and the number of patches is no square.
    """
    edge = round(patches**0.5)
    known = {"pos_embed_grid": saved if saved is None else tuple(saved.flatten().tolist()), "img_size": given}
    found = {name: grid for name, grid in known.items() if grid is not None} or {"its length": (edge, edge)}
    grid = next(iter(found.values()))
    if any(len(other) != 2 or other[0] * other[1] != patches or other != grid for other in found.values()):
        said = " and ".join(f"{name} says {' x '.join(map(str, other))}" for name, other in found.items())
        raise ValueError(
            f"cannot tell the grid of a position table with {patches} patches: {said}; give checkpoint_filter_fn the "
            "img_size of the images that it is for"
        )
    return grid
