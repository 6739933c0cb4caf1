"""Argument checks of the public functions. Messages give the argument, its value and the rule it breaks."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def check(holds: bool, name: str, t: Tensor, rule: str, got: object = None) -> None:
    """Raise ValueError unless `holds`: '<name> must <rule>, got <shape or `got`>'."""
    if not holds:
        raise ValueError(f"{name} must {rule}, got {shape_of(t) if got is None else got}")


def check_tensors(tensors: dict[str, Tensor | None], like: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raise unless each argument is None or a tensor of an allowed dtype on the device of the argument `like`."""
    present = {name: t for name, t in tensors.items() if t is not None}
    for name, t in present.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    device = present[like].device
    for name, t in present.items():
        if t.device != device:
            raise ValueError(f"{name} must be on the device of {like}, {device}, got {t.device}")
        if t.dtype not in dtypes:
            raise TypeError(f"{name} must have a dtype of {[str(d) for d in dtypes]}, got {t.dtype}")


def check_shape(name: str, t: Tensor | None, dims: str, want: tuple[int, ...]) -> None:
    if t is not None and t.shape != want:  # first: formatting the message costs more than the check
        raise ValueError(f"{name} must be {dims} = {want}, got {shape_of(t)}")
