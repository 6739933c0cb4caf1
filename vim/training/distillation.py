"""Distillation: a trained model, the teacher, is asked about the images that another one learns from."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vim.data import EvalDataConfig

from .config import DistillConfig, LoadedModelConfig
from .errors import ConfigError
from .model import label_names, load_model, resolve_input


class Teacher:
    """A trained model that only answers: nothing of it is learned, sharded or saved with the run.

    (timm.task has teachers too. They take the student's mean and std from its model, whatever the data's are, leave
    images at the student's size, and make the CPU wait for the GPU in every step.)

    Args:
        config: names it.
        classes: of the data set, in label order.
        data_config: input_size, mean and std of the student's images.
        accelerator: has the device, and the precision of the forward pass.

    Raises: ConfigError as `load_model`, and for other classes or channels than the student's.
    """

    def __init__(
        self, config: DistillConfig, classes: list[str], data_config: dict[str, Any], accelerator: Accelerator
    ):
        assert config.teacher is not None
        model = load_model(LoadedModelConfig(config.teacher, config.checkpoint, config.kwargs), "distill.")
        self.model = model.eval().requires_grad_(False).to(accelerator.device)
        self.accelerator = accelerator
        own = resolve_input(self.model, config.kwargs, EvalDataConfig())
        _check(config.teacher, self.model.num_classes, label_names(self.model), classes)  # type: ignore[arg-type]
        (channels, *size), student_channels = own["input_size"], data_config["input_size"][0]
        if channels != student_channels:
            raise ConfigError(
                f"the teacher {config.teacher} wants images of {channels} channels, the model {student_channels}; "
                "set distill.kwargs.in_chans or choose another teacher"
            )
        self.size = tuple(size)
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=accelerator.device).view(-1, 1, 1)
            for values in (data_config["mean"], data_config["std"], own["mean"], own["std"])
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) in fp32, for the student's images (B, C, H, W), normalised and sized for the teacher."""
        images = torch.addcmul(self.shift, images, self.scale)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        with self.accelerator.autocast():
            return self.model(images).float()


def distillation_loss(logits: Tensor, answers: Tensor, config: DistillConfig) -> Tensor:
    """How far a student is from its teacher; mean over the batch.

    hard: cross-entropy with the teacher's class. soft: Kullback-Leibler divergence of the probabilities at a
    temperature, times its square, so that gradients do not shrink with it.

    Args:
        logits, answers: of the student and of the teacher, (B, classes).

    Source: Hinton et al. 2015, arXiv 1503.02531; DeiT, Touvron et al. 2021, arXiv 2012.12877, equations 2 and 3. (The
        code of DeiT divides the divergence by the number of classes besides.)
    """
    if config.mode == "hard":
        return F.cross_entropy(logits, answers.argmax(1))
    student, teacher = (F.log_softmax(x / config.temperature, 1) for x in (logits, answers))
    return config.temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check(teacher: str, num_classes: int, names: list[str] | None, classes: list[str]) -> None:
    remedy = "give one that was trained on the classes of the data set"
    if num_classes != len(classes):
        raise ConfigError(f"the teacher {teacher} has {num_classes} classes, the data set {len(classes)}; {remedy}")
    for label, (name, own) in enumerate(zip(names or classes, classes, strict=False)):
        if name != own:
            raise ConfigError(f"class {label} of the teacher {teacher} is {name!r}, of the data set {own!r}; {remedy}")
