"""Models sharded across processes: torch's FSDP2, applied block by block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vim.checkpoint import Piece

from .diagnosis import block_of


def shard(model: nn.Module) -> None:
    """Shard parameters and gradients, and thereby the optimizer state, across all processes, in place.

    Each block is gathered for its forward and its backward pass. Parameters keep their precision, and autocast sets the
    precision of operations: FSDP's own mixed precision would round A_log.
    """
    blocks = {name for name, _ in model.named_modules() if name and block_of(name) == name and name[-1].isdigit()}
    for name, module in model.named_modules():
        if name in blocks:
            fully_shard(module)
    fully_shard(model)


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with full tensors instead of shards. All processes call this together."""
    return {key: t.full_tensor().cpu() if isinstance(t, DTensor) else t for key, t in state.items()}


def own_pieces(state: Any) -> Any:
    """Nested dicts and lists, with this process's pieces instead of sharded tensors."""
    if isinstance(state, DTensor):
        return Piece(state.to_local().cpu(), state.shape)
    if isinstance(state, dict):
        return {key: own_pieces(value) for key, value in state.items()}
    return [own_pieces(value) for value in state] if isinstance(state, list) else state


def scatter_optimizer_state(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer state of full tensors, sharded like the parameters.

    Args:
        parameters: of the optimizer, in the order of its groups.
    """
    sharded = {}
    for number, entries in state["state"].items():
        parameter = parameters[number]
        sharded[number] = {key: _sharded_like(value, parameter) for key, value in entries.items()}
    return state | {"state": sharded}


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict of full tensors into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({key: _sharded_like(t, own[key]) if key in own else t for key, t in state.items()})


def _sharded_like(value: Any, like: Tensor) -> Any:
    if isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
