"""Compute the maps.

Shapes: B batch, L tokens of a sequence or scan, P patches, E channels of a scan, N states of a channel, D model width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scanning_model import Scan, ScanningModel

CLASS_MAP = "class map"  # its key in block_maps


def as_pixels(images: Tensor, data_config: dict[str, Any]) -> Tensor:
    """Undo the normalisation of model inputs (B, 1 or 3, H, W): pixels (B, H, W) or (B, H, W, 3) in 0..1."""
    mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ("mean", "std"))
    return (images.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).squeeze(-1)


@torch.no_grad()
def block_maps(model: ScanningModel, images: Tensor, classes: Tensor, block: int) -> dict[str, Tensor]:
    """All maps (B, rows, columns) of one block by name: means over channels, and the class map of `classes` (B,)."""
    scan, places = _look(model, images, block)
    sizes = step_sizes(scan)
    directions = ("",) if len(sizes) == 1 else (", forward", ", backward")
    values = {f"step size{d}": v.mean(2) for d, v in zip(directions, sizes, strict=True)}
    tokens = class_tokens(model, len(places))
    if len(tokens):
        reader = "register" if model.class_token == "registers" else "class token"
        reads = zip(directions, implicit_attention(scan, places[tokens]), strict=True)
        values |= {f"{reader} reads{d}": v.abs().mean((1, 3)) for d, v in reads}
    maps = {name: image_maps(model, v[:, places]) for name, v in values.items()}
    maps[CLASS_MAP] = class_map(model, images, classes, block)
    return {name: m.float().cpu() for name, m in maps.items()}


def scan_of_block(model: ScanningModel, images: Tensor, block: int) -> Scan:
    """Inputs of a block's scan for images (B, C, H, W), in the order in which its mixer reads the tokens.

    Returns: arguments of `bidirectional_selective_scan`; of `ssd` for a Mamba2.
    """
    return _look(model, images, block)[0]


@torch.no_grad()
def _look(model: ScanningModel, images: Tensor, block: int) -> tuple[Scan, Tensor]:
    """The scan of a block, and for each token of the sequence its place (L,) in the scan."""
    chosen, seen, places = model.blocks[block], [], []
    handles = [
        chosen.mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])),
        chosen.register_forward_pre_hook(
            lambda module, inputs, options: places.append(module.mixer_places(options["layout"], inputs[0].shape[1])),
            with_kwargs=True,
        ),
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return chosen.mixer.scan_inputs(seen[0]), places[0].cpu()


class Direction(NamedTuple):
    """One direction of a scan. E counts channels, or the heads of an `ssd`, whose channels share all of this."""

    delta: Tensor  # (B, L, E)
    A: Tensor  # (E, N), or (E, 1) for the same decay of all states
    B: Tensor  # (B, L, 1 or E, N)
    C: Tensor


def _directions(scan: Scan) -> list[Direction]:
    if isinstance(scan["dt"], Tensor):  # of ssd; a group of heads shares B and C
        heads = scan["dt"].shape[2]
        B, C = (scan[name].float().repeat_interleave(heads // scan[name].shape[2], 2) for name in "BC")
        return [Direction(F.softplus(scan["dt"].float() + scan["dt_bias"].float()), scan["A"].float()[:, None], B, C)]
    return [
        Direction(F.softplus(dt.float() + bias.float()), A.float(), B.float().unsqueeze(2), C.float().unsqueeze(2))
        for dt, bias, A, B, C in zip(*(scan[name] for name in ("dt", "dt_bias", "A", "B", "C")), strict=True)
    ]


def step_sizes(scan: Scan) -> tuple[Tensor, ...]:
    """delta (B, L, E), forward and backward if there are two directions: how strongly a token enters the state."""
    return tuple(direction.delta for direction in _directions(scan))


def implicit_attention(scan: Scan, rows: Tensor | list[int]) -> tuple[Tensor, ...]:
    """How much each token contributes to the scan's output at chosen tokens, before D and the gate.

    For each channel, a selective scan is a matrix over tokens: y[t] = sum over s of attention[t, s] u[s], with

        attention[t, s] = sum over n of C[t, n] exp(A[n] (delta[s + 1] + ... + delta[t])) delta[s] B[s, n]

    for s <= t in the forward direction and s >= t in the backward one, else 0.

    Args:
        scan: from `scan_of_block`. rows: the tokens t, in the order of the scan.

    Returns: (B, rows, L, E), forward and backward if there are two directions. For an `ssd`, E counts its heads.

    Source: Ali et al. 2024, arXiv 2403.01590, equation 12.
    """
    rows = torch.as_tensor(rows)
    found = []
    for i, (delta, A, B, C) in enumerate(_directions(scan)):
        reverse = i == 1
        if reverse:
            delta, B, C = delta.flip(1), B.flip(1), C.flip(1)
        length = delta.shape[1]
        at = length - 1 - rows if reverse else rows
        past = delta.cumsum(1)  # (B, L, E)
        writes = []
        for t in at.tolist():
            decay = torch.exp((past[:, t : t + 1] - past)[:, : t + 1, :, None] * A)  # (B, t + 1, E, N or 1)
            weights = torch.einsum("ben,blen,blen->ble", C[:, t], decay, B[:, : t + 1]) * delta[:, : t + 1]
            writes.append(F.pad(weights, (0, 0, 0, length - 1 - t)))
        attention = torch.stack(writes, 1)
        found.append(attention.flip(2) if reverse else attention)
    return tuple(found)


def image_maps(model: ScanningModel, values: Tensor) -> Tensor:
    """Values of tokens in sequence order (B, L) -> map of the patches (B, rows, columns)."""
    patches = model.prefix_first(values.unsqueeze(2))[:, model.num_prefix_tokens :, 0]
    return patches.unflatten(1, model.patch_embed.grid_size)


def class_tokens(model: ScanningModel, length: int) -> Tensor:
    """Positions of the class tokens in a sequence."""
    order = model.prefix_first(torch.arange(length)[None, :, None])[0, :, 0]
    return order[: model.num_prefix_tokens]


def class_map(model: ScanningModel, images: Tensor, classes: Tensor, block: int) -> Tensor:
    """Grad-CAM on the input tokens of a block: (B, rows, columns), non-negative.

    Not on its output: after the last block, only the class token affects the logits.

    Args:
        images: (B, C, H, W). classes: (B,), to explain.

    Source: Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(inputs[0].detach().requires_grad_())
        return (seen[0],)

    handle = model.blocks[block].register_forward_pre_hook(keep)
    try:
        with torch.enable_grad():
            score = model(images).gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, seen)
    finally:
        handle.remove()
    prefix = model.num_prefix_tokens
    value, gradient = (model.prefix_first(t)[:, prefix:] for t in (seen[0].detach(), gradient))
    weights = gradient.mean(1, keepdim=True)  # per channel, mean over the image
    return (value * weights).sum(2).relu().unflatten(1, model.patch_embed.grid_size)


def receptive_field(model: ScanningModel, images: Tensor, block: int) -> Tensor:
    """Gradient of the centre patch after a block with respect to the pixels: (H, W), magnitude, mean over the images.

    Source: Luo et al. 2016, arXiv 1701.04128, section 2.
    """
    images = images.detach().clone().requires_grad_()
    seen: list[Tensor] = []
    handle = model.blocks[block].register_forward_hook(lambda *args: seen.append(args[-1]))
    try:
        with torch.enable_grad():
            model(images)
    finally:
        handle.remove()
    patches = model.prefix_first(seen[0])[:, model.num_prefix_tokens :]
    rows, columns = model.patch_embed.grid_size
    middle = patches[:, rows // 2 * columns + columns // 2]
    (gradient,) = torch.autograd.grad(middle.sum(), images)
    return gradient.abs().sum(1).mean(0)
