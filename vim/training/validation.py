"""Accuracy of a model on one split of a data set, at one or several sizes and crops of the images."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from vim.console.progress import Progress
from vim.data import EvalDataConfig, EvalImages, eval_loader, eval_transform, open_images
from vim.files import write_json
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import LoadedModelConfig
from vim.timm_models.create import load_model, weights_from
from vim.timm_models.input import at_size, resolve_input
from vim.timm_models.precision import Precision

from .evaluation import evaluate
from .labels import LabelSet, map_labels


@dataclass
class ValidateConfig(LoadedModelConfig):
    """The evaluation."""

    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    labels: LabelSet = "folder"
    """Which images are of which class. folder: class folders are named as the model's classes. imagenet-v2: they are
    numbers. imagenet-real: ImageNet's val, with a set of right labels for each image. imagenet-a, imagenet-r: they are
    the set's 200 classes, and the model's others take no part."""
    img_sizes: list[int] = field(default_factory=list)
    """Edges of the images in pixels, to evaluate at each; position tables are resampled. Empty: data.img_size."""
    crop_pcts: list[float] = field(default_factory=list)
    """Parts that the centre crop keeps, 0..1, to evaluate with each, at each size. Empty: data.crop_pct."""
    precision: Precision = "fp32"
    """Of the forward pass."""
    output: str = "validate.json"
    """File for the results."""

    def __post_init__(self):
        for name, one in (("img_sizes", "img_size"), ("crop_pcts", "crop_pct")):
            if getattr(self, name) and getattr(self.data, one) is not None:
                raise ValueError(f"{name} and data.{one} are both given; give one of them")
        if self.img_sizes and min(self.img_sizes) < 1:
            raise ValueError(f"img_sizes must be at least 1 pixel, got {self.img_sizes}")
        if not all(0 < crop_pct <= 1 for crop_pct in self.crop_pcts):
            raise ValueError(f"crop_pcts must be above 0 and at most 1, got {self.crop_pcts}")


def validate(config: ValidateConfig) -> dict[str, Any]:
    """Evaluate a model on data.val_split and write the results to config.output.

    Returns: the results: model, split and, for each size and crop, images, loss, top1, top5 (percent) and the
        preprocessing; of several, as a list `rows`.
    Raises: DataError or ConfigError, with a message for the user.
    """
    accelerator = create_accelerator(config.precision)
    progress = Progress(accelerator.is_main_process)
    source = open_images(config.data, config.data.val_split)
    split = str(source.path)
    model = load_model(config).to(accelerator.device)
    progress.line(f"weights: {weights_from(model)}")
    labels = map_labels(config.labels, source, split, model, config.model)
    if len(source.classes) < model.num_classes:
        others = "may be predicted too" if labels.candidates is None else "take no part"
        progress.line(f"{split} has {len(source.classes)} of {model.num_classes} classes; the others {others}")

    sizes: list[int | None] = [*config.img_sizes] or [config.data.img_size]
    crops: list[float | None] = [*config.crop_pcts] or [config.data.crop_pct]
    # All of them at first, so that a size that the model cannot take is found before hours of evaluation.
    models = {size: at_size(model, config, size) for size in sizes}
    rows: list[dict[str, Any]] = []
    for size, crop_pct in product(sizes, crops):
        data = replace(config.data, img_size=size, crop_pct=crop_pct)
        data_config = resolve_input(model, config.kwargs, data)
        in_chans = data_config["input_size"][0]
        images = EvalImages(labels.images, eval_transform(data_config), in_chans, data.bad_images)  # type: ignore[arg-type]
        batches = accelerator.prepare(eval_loader(images, data.batch_size, data.num_workers))
        evaluation = evaluate(models[size], batches, accelerator, progress, labels.answers, labels.candidates)
        accelerator.free_memory()  # and with the loader its processes
        rows.append(
            {
                "images": evaluation.images,
                "bad_images": evaluation.bad_images,
                **evaluation.metrics(),
                "not_finite": evaluation.not_finite,
                "parameters": sum(p.numel() for p in models[size].parameters()),
                "preprocessing": data_config,
            }
        )
        if len(sizes) * len(crops) > 1:
            height, width = data_config["input_size"][1:]
            progress.line(f"{height} x {width} pixels, crop {data_config['crop_pct']}: top-1 {evaluation.top1:.2f} %")
    results = {
        "model": config.model,
        "checkpoint": config.checkpoint,
        "split": split,
        "labels": config.labels,
        "precision": config.precision,
        **(rows[0] if len(rows) == 1 else {"rows": rows}),
    }
    if accelerator.is_main_process:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, output)
    accelerator.end_training()
    return results
