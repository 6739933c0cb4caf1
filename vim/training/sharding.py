"""A model whose parameters are divided among the processes: torch's FSDP2, wrapped block by block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vim.checkpoint import Piece

from .diagnosis import block_of


def shard(model: nn.Module) -> None:
    """Divide parameters, gradients and with them the optimizer's state among all processes, in place.

    What a block needs is gathered for its forward and its backward. Parameters stay in their precision and autocast
    decides on that of operations: FSDP's own mixed precision would round A_log.
    """
    blocks = {name for name, _ in model.named_modules() if name and block_of(name) == name and name[-1].isdigit()}
    for name, module in model.named_modules():
        if name in blocks:
            fully_shard(module)
    fully_shard(model)


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with whole tensors in place of shards. All processes call this together."""
    return {key: t.full_tensor().cpu() if isinstance(t, DTensor) else t for key, t in state.items()}


def own_pieces(state: Any) -> Any:
    """Nested dicts and lists with this process's pieces in place of sharded tensors."""
    if isinstance(state, DTensor):
        return Piece(state.to_local().cpu(), state.shape)
    if isinstance(state, dict):
        return {key: own_pieces(value) for key, value in state.items()}
    return [own_pieces(value) for value in state] if isinstance(state, list) else state


def scatter_optimizer_state(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer's state of whole tensors with those cut that belong to sharded parameters.

    Args:
        parameters: of the optimizer, in the order of its groups.
    """
    cut = {}
    for number, entries in state["state"].items():
        like = parameters[number]
        cut[number] = {key: _like(value, like) for key, value in entries.items()}
    return state | {"state": cut}


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a model, sharded or not."""
    here = model.state_dict()
    model.load_state_dict({key: _like(value, here[key]) if key in here else value for key, value in state.items()})


def _like(value: Any, like: Tensor) -> Any:
    if isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
