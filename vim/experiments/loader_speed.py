"""Throughput of the training loader alone."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from timm.models import resolve_model_input_args

from vim.checkpoint import one_line
from vim.console.errors import ConfigError
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig
from vim.timm_models.input import resolve_input
from vim.timm_models.name import timm_name
from vim.training.classification_data import ClassificationData
from vim.training.config import TrainConfig
from vim.training.state import UpdateSplit


def loader_speed(config: TrainConfig, workers: int, seconds: float) -> float:
    """Images per second that the workers read, decode, augment and send. No model is made.

    Args:
        config: of the training. Images have the full size, whatever data.progressive says.
        workers: worker processes; replaces data.num_workers.
        seconds: duration of the measurement, which starts after the first batch of every worker.
    """
    data = replace(config.data, num_workers=workers, progressive=[])
    accelerator = create_accelerator("fp32")
    total_batch = UpdateSplit(data.batch_size, accelerator.num_processes, config.accumulate).total_batch
    data_config = resolve_input(_without_weights(config.model), config.model.kwargs, data)
    loader = ClassificationData(data).train_batches(config.augment, data_config, config.seed, total_batch)
    batches: Any = accelerator.prepare(loader)
    warm, epoch, images = max(workers, 1), 0, 0
    start = time.perf_counter()
    while True:
        batches.set_epoch(epoch)
        for inputs, *_ in batches:
            if warm:
                warm -= 1
                start = time.perf_counter()
                continue
            images += len(inputs)
            if (passed := time.perf_counter() - start) >= seconds:
                return images / passed
        epoch += 1


def _without_weights(config: ModelConfig) -> Any:
    """Stands in for the model: `resolve_input` reads its pretrained_cfg alone.

    Raises: ConfigError for a model that does not exist or whose configuration cannot be fetched.
    """
    try:
        found = resolve_model_input_args(timm_name(config.name), **config.kwargs)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot find the input of {config.name}: {one_line(error)}") from error
    return SimpleNamespace(pretrained_cfg=found["pretrained_cfg"])
