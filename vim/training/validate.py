"""Accuracy of a model on one split of a data set."""

import json
from pathlib import Path
from typing import Any

from vim.data import EvalImages, LabelledImages, eval_loader, eval_transform, open_images

from .config import ValidateConfig
from .errors import ConfigError
from .evaluation import evaluate
from .model import label_names, load_model, resolve_input
from .progress import Progress
from .trainer import create_accelerator


def validate(config: ValidateConfig) -> dict[str, Any]:
    """Evaluate a model on data.val_split and write the results to config.output.

    Returns: the results: model, split, images, loss, top1, top5 (percent) and the preprocessing.
    Raises: DataError or ConfigError, with a message for the user.
    """
    accelerator = create_accelerator(config.precision)
    progress = Progress(accelerator.is_main_process)
    source = open_images(config.data, config.data.val_split)
    model = load_model(config).to(accelerator.device)
    _check_classes(model, source, config.model)
    data_config = resolve_input(model, config.kwargs, config.data)
    images = EvalImages(source, eval_transform(data_config), data_config["input_size"][0], config.data.bad_images)
    batches = accelerator.prepare(eval_loader(images, config.data.batch_size, config.data.num_workers))
    evaluation = evaluate(model, batches, accelerator, progress)
    results = {
        "model": config.model,
        "checkpoint": config.checkpoint,
        "split": str(source.path),
        "images": evaluation.images,
        "bad_images": evaluation.bad_images,
        **evaluation.metrics(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": config.precision,
        "preprocessing": data_config,
    }
    if accelerator.is_main_process:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(results, indent=2) + "\n")
    accelerator.end_training()
    return results


def _check_classes(model, source: LabelledImages, name: str) -> None:
    if model.num_classes != len(source.classes):
        raise ConfigError(f"{name} has {model.num_classes} classes, {source.path} has {len(source.classes)}")
    names = label_names(model)
    if names and list(names) != source.classes:
        raise ConfigError(f"{name} was trained on the classes {names}, {source.path} has {source.classes}")
