"""What timm models cost: parameters, multiply-adds with and without the scan, activations."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vim_kernels  # noqa: F401  (registers the operators)
from vim.checkpoint import one_line
from vim.console.errors import ConfigError
from vim.console.progress import Progress
from vim.data import EvalDataConfig
from vim.files import write_json
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model_at
from vim.timm_models.input import resolve_input

aten, ours = torch.ops.aten, torch.ops.vim_kernels
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, ours.causal_conv1d)
SCANS = (ours.selective_scan, ours.count_ssd, ours.count_long_conv)


@dataclass
class ProfileConfig:
    """The profile."""

    models: list[str] = field(default_factory=lambda: ["vim_tiny", "deit_tiny_patch16_224"])
    """Any timm models, run folders (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    img_size: int | None = None
    """Height and width of the images, in pixels; null: each model's own."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model for all models, for example num_classes."""
    output: str = "runs/profile.json"
    """File for the results."""

    def __post_init__(self):
        if not self.models:
            raise ConfigError("models must name at least one model")
        if self.img_size is not None and self.img_size < 1:
            raise ConfigError(f"img_size must be at least 1, got {self.img_size}")


def profile(config: ProfileConfig) -> list[dict[str, Any]]:
    """Count what an image costs in each model, and write the rows to config.output.

    Nothing is computed and no weights are loaded: the models are on torch's `meta` device.

    Returns: for each model its name, kwargs and input_size (C, H, W); parameters; macs, macs_with_scan and activations,
        see `cost`.
    Raises: ConfigError for a model that cannot be made, or that does not take the size.
    """
    rows, progress = [], Progress()
    with progress.bar("models", len(config.models)) as advance:
        for name in config.models:
            rows.append(_row(name, config))
            advance(name)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(rows, output)
    return rows


def _row(name: str, config: ProfileConfig) -> dict[str, Any]:
    source = ModelConfig(name, pretrained=False, kwargs=config.kwargs)
    with torch.device("meta"):
        model, kwargs = create_model_at(source, None, config.img_size, section="")
    size = resolve_input(model, kwargs, EvalDataConfig(img_size=config.img_size))["input_size"]
    try:
        counts = cost(model.eval(), size)
    except (AssertionError, RuntimeError, ValueError) as error:  # timm's models raise any of these
        _, height, width = size
        raise ConfigError(f"{name} cannot take images of {height} x {width} pixels: {one_line(error)}") from error
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": name, "kwargs": kwargs, "input_size": list(size), "parameters": parameters, **counts}


@torch.no_grad()
def cost(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    """What the forward pass of one image costs.

    Args: model: on the meta device, where nothing is computed. (On a CPU torch does not count fused attention.)
        input_size: (C, H, W).

    Returns:
        macs: multiply-adds of linear layers, convolutions and attention.
        macs_with_scan: plus half the operations of the scan, `ssd` and `long_conv`; see vim_kernels/flops.py.
        activations: elements that linear layers, convolutions and attention's products return, as in fvcore.
    """
    image = torch.empty(1, *input_size, device="meta")
    operations = FlopCounterMode(display=False)
    elements = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(PRODUCTS, _elements))
    with operations, elements:
        model(image)
    flops, sizes = (counter.get_flop_counts()["Global"] for counter in (operations, elements))
    total = sum(flops.values())
    return {
        "macs": (total - sum(flops.get(operator, 0) for operator in SCANS)) // 2,
        "macs_with_scan": total // 2,
        "activations": sum(sizes.get(operator, 0) for operator in PRODUCTS),
    }


def _elements(*_, out_shape, **__) -> int:
    shapes = out_shape if isinstance(out_shape, list) else [out_shape]  # two convolutions return a list
    return sum(map(math.prod, shapes))


def profile_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("model")
    for column in ("pixels", "parameters", "GMAC", "with the scan", "activations"):
        table.add_column(column, justify="right")
    for row in rows:
        height, width = row["input_size"][1:]
        macs, with_scan = (f"{row[key] / 1e9:,.2f}" for key in ("macs", "macs_with_scan"))
        parameters, activations = (f"{row[key] / 1e6:,.1f} M" for key in ("parameters", "activations"))
        table.add_row(row["model"], f"{height} x {width}", parameters, macs, with_scan, activations)
    return table
