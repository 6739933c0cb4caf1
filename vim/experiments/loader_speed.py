"""Speed of a training loader with nobody waiting for it but a stopwatch."""

import copy
import time

from vim.console.progress import Progress
from vim.timm_models.accelerator import create_accelerator
from vim.training.classification import Classification
from vim.training.config import TrainConfig


def loader_speed(config: TrainConfig, workers: int, seconds: float) -> float:
    """Images per second that so many loading processes read, decode, augment and hand over.

    Args:
        config: of the training; its model is only asked for the size of its images, which is the full one.
        seconds: of the measurement, after a first batch of every process.
    """
    config = copy.deepcopy(config)
    config.data.num_workers = workers
    config.data.progressive = []
    config.model.cuda_graph, config.distill.teacher = False, None
    trainer = Classification(config, create_accelerator("fp32"), Progress(False))
    warm, epoch, images = max(workers, 1), 0, 0
    start = time.perf_counter()
    while True:
        trainer.train_batches.set_epoch(epoch)
        for inputs, *_ in trainer.train_batches:
            if warm:
                warm -= 1
                start = time.perf_counter()
                continue
            images += len(inputs)
            if (passed := time.perf_counter() - start) >= seconds:
                return images / passed
        epoch += 1
