"""Knowledge distillation: a student also learns from a trained teacher's predictions on its training images."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vim.console.errors import ConfigError
from vim.data import EvalDataConfig
from vim.timm_models.config import LoadedModelConfig
from vim.timm_models.create import label_names, load_model
from vim.timm_models.input import resolve_input


@dataclass
class DistillConfig:
    """Distillation from a trained teacher: loss = (1 - alpha) x label loss + alpha x teacher loss."""

    teacher: str | None = None
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>; null: no teacher."""
    checkpoint: str | None = None
    """Weights file of the teacher; null: its released weights, or those of the folder or repository."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model for the teacher, for example img_size."""
    mode: Literal["soft", "hard"] = "hard"
    """soft: learn the teacher's probabilities (Hinton et al. 2015). hard: learn its most probable class (DeiT)."""
    alpha: float = 0.5
    """Weight of the teacher loss, 0..1."""
    temperature: float = 3.0
    """Soft mode: divides the logits of both models. Above 1, less probable classes count more."""

    def __post_init__(self):
        if "num_classes" in self.kwargs:
            raise ValueError(
                "distill.kwargs.num_classes could give the teacher an untrained head; leave it out, and train the "
                "teacher on the classes of the data set first"
            )
        if self.teacher is None and (self.checkpoint or self.kwargs):
            raise ValueError("distill.checkpoint and distill.kwargs need a distill.teacher; set one")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"distill.alpha must be in 0 .. 1, got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature must be positive, got {self.temperature}")


class Teacher:
    """A trained model in eval mode. It is not trained, sharded or saved with the run.

    (timm.task has teachers too. They take mean and std from the student model, even if the data use others, keep
    images at the student's size, and make the CPU wait for the GPU in every step.)

    Args:
        config: which teacher.
        classes: class names of the data set, in label order.
        data_config: input_size, mean and std of the student's images.
        accelerator: sets the device and the precision of the forward pass.

    Raises: ConfigError as `load_model`, and if classes or channels differ from the student's.
    """

    def __init__(
        self, config: DistillConfig, classes: list[str], data_config: dict[str, Any], accelerator: Accelerator
    ):
        assert config.teacher is not None
        model = load_model(LoadedModelConfig(config.teacher, config.checkpoint, config.kwargs), "distill.")
        self.model = model.eval().requires_grad_(False).to(accelerator.device)
        self.accelerator = accelerator
        own = resolve_input(self.model, config.kwargs, EvalDataConfig())
        _check_classes(config.teacher, self.model.num_classes, label_names(self.model), classes)
        (channels, *size), student_channels = own["input_size"], data_config["input_size"][0]
        if channels != student_channels:
            raise ConfigError(
                f"the teacher {config.teacher} takes images with {channels} channels, the student {student_channels}; "
                "set distill.kwargs.in_chans, or choose another teacher"
            )
        self.size = tuple(size)
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=accelerator.device).view(-1, 1, 1)
            for values in (data_config["mean"], data_config["std"], own["mean"], own["std"])
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) in fp32. The student's images (B, C, H, W) are renormalised and resized first."""
        images = torch.addcmul(self.shift, images, self.scale)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        with self.accelerator.autocast():
            return self.model(images).float()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, config: DistillConfig) -> Tensor:
    """Loss of the student against the teacher, mean over the batch.

    hard: cross-entropy with the teacher's most probable class. soft: KL divergence of the probabilities at a
    temperature T, times T squared, so that gradients do not shrink with T.

    Args:
        logits, teacher_logits: (B, classes).

    Source: Hinton et al. 2015, arXiv 1503.02531; DeiT, Touvron et al. 2021, arXiv 2012.12877, equations 2 and 3. (The
        code of DeiT also divides the divergence by the number of classes.)
    """
    if config.mode == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(1))
    student, teacher = (F.log_softmax(x / config.temperature, 1) for x in (logits, teacher_logits))
    return config.temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _check_classes(teacher: str, num_classes: int, names: list[str] | None, classes: list[str]) -> None:
    remedy = "choose a teacher that was trained on the classes of the data set"
    if num_classes != len(classes):
        raise ConfigError(f"the teacher {teacher} has {num_classes} classes, the data set {len(classes)}; {remedy}")
    for label, (name, own) in enumerate(zip(names or classes, classes, strict=False)):
        if name != own:
            raise ConfigError(f"class {label} is {name!r} in the teacher {teacher}, {own!r} in the data set; {remedy}")
