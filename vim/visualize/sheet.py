"""Sheets of maps as PNG files. matplotlib is optional: imported only here."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vim.console.errors import ConfigError
from vim.console.output import make_output
from vim.console.progress import Progress
from vim.data import EvalDataConfig, eval_transform, open_images, spread
from vim.figures import MAX_LINE, plain_text, save_figure
from vim.timm_models.create import label_names, load_model, weights_from
from vim.timm_models.input import resolve_input

from .config import VisualizeConfig
from .maps import as_pixels, block_maps, receptive_field
from .scanning_model import ScanningModel, has_scans


def visualize(config: VisualizeConfig) -> list[Path]:
    """Write a sheet per image, with a row per block, and a sheet of receptive fields.

    Returns: the files.
    Raises: DataError, ConfigError, with a message for the user.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config).to(device).eval()
    if not model.num_classes:
        raise ConfigError(f"{config.model} has no classes to explain; choose a classifier")
    Progress().line(f"weights: {weights_from(model)}")
    if not has_scans(model):
        raise ConfigError(
            f"{config.model} is no Vision Mamba: its blocks have no selective scan to show; choose one, as vim_tiny"
        )
    blocks = _chosen_blocks(model, config.blocks)
    data_config = resolve_input(model, config.kwargs, EvalDataConfig())
    transform, in_chans = eval_transform(data_config), data_config["input_size"][0]
    source = open_images(config.images)
    chosen = spread(len(source), min(config.count, len(source)))
    images = torch.stack([transform(source.load(i, in_chans)) for i in chosen]).to(device)
    names, folder = label_names(model), make_output(config.output)
    with torch.no_grad():
        logits = model(images).float()
    classes = logits.argmax(1)
    parts = logits.softmax(1).gather(1, classes[:, None])[:, 0].tolist()
    maps = [block_maps(model, images, classes, block) for block in blocks]
    shown = as_pixels(images, data_config).numpy()

    files = []
    for i, index in enumerate(chosen):
        label = int(classes[i])
        name = plain_text(names[label] if names else f"class {label}")
        title = f"{plain_text(source.name(index), MAX_LINE)}: {name}, {parts[i]:.0%}"
        files.append(folder / f"{i}.png")
        _draw(files[-1], title, shown[i], [{k: m[i] for k, m in row.items()} for row in maps], blocks)
    files.append(folder / "receptive_fields.png")
    _draw_fields(files[-1], [receptive_field(model, images, block).cpu() for block in blocks], blocks)
    return files


def _chosen_blocks(model: ScanningModel, blocks: list[int] | None) -> list[int]:
    count = len(model.blocks)
    if blocks is None:
        return sorted({0, count // 2, count - 1})
    if wrong := [b for b in blocks if not -count <= b < count]:
        raise ConfigError(f"the model has blocks 0 to {count - 1}, got {wrong[0]}")
    return [b % count for b in blocks]


def _draw(path: Path, title: str, image: np.ndarray, rows: list[dict[str, Tensor]], blocks: list[int]) -> None:
    from matplotlib.figure import Figure

    names = list(rows[0])
    figure = Figure(figsize=(2.1 * (1 + len(names)), 2.2 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), 1 + len(names), squeeze=False)
    height, width = image.shape[:2]
    for axes, row, block in zip(grid, rows, blocks, strict=True):
        axes[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        axes[0].set_ylabel(f"block {block}")
        for place, name in zip(axes[1:], names, strict=True):
            place.imshow(image, cmap="gray", vmin=0, vmax=1)
            # Each map has its own scale, from its minimum to its maximum.
            drawn = place.imshow(
                row[name].numpy(), cmap="magma", alpha=0.75, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            figure.colorbar(drawn, ax=place, shrink=0.7, pad=0.02).ax.tick_params(labelsize=6)
            if row is rows[0]:
                place.set_title(name, fontsize=8)
    for place in grid.flat:
        place.set(xticks=[], yticks=[])
    save_figure(figure, path, 110)


def _draw_fields(path: Path, fields: list[Tensor], blocks: list[int]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(fields), 3), layout="constrained")
    figure.suptitle("gradient of the centre patch\n(square root)")
    for axes, field, block in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, blocks, strict=True):
        axes.imshow(field.sqrt().numpy(), cmap="magma")
        axes.set(xticks=[], yticks=[], title=f"after block {block}")
    save_figure(figure, path, 110)
