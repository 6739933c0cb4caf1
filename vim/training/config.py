"""The configuration of a training run. Every field is explained in `--help`."""

from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vim.console.free_on_resume import FREE_ON_RESUME
from vim.data import AugmentConfig, DataConfig
from vim.timm_models.config import ModelConfig
from vim.timm_models.precision import Precision

from .averaging import EmaConfig
from .distillation import DistillConfig
from .optim import OptimConfig, ScheduleConfig

# Files of a run folder.
CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.jsonl"


@dataclass
class CheckpointConfig:
    """Checkpoints, besides those at the end of every epoch and on SIGTERM or Ctrl-C."""

    every_minutes: float | None = 10.0
    """Minutes between checkpoints; null: none by time."""
    every_updates: int | None = None
    """Updates between checkpoints; null: none by count."""
    keep: int = 0
    """Number of best epochs whose checkpoints are also kept, as epoch-<number>.pt; 0: none."""

    def __post_init__(self):
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes must be positive, or null, got {self.every_minutes}")
        if self.every_updates is not None and self.every_updates < 1:
            raise ValueError(f"checkpoint.every_updates must be at least 1, or null, got {self.every_updates}")
        if self.keep < 0:
            raise ValueError(f"checkpoint.keep must be 0 or more, got {self.keep}")


@dataclass
class RunConfig:
    """Settings of every kind of training."""

    TOOL: ClassVar[str]  # the tool that reads this configuration

    run_dir: str = field(default="runs/train", metadata=FREE_ON_RESUME)
    """Run folder; must be new, or hold the run to resume."""
    seed: int = 0
    """Random seed of initial weights, data order, augmentation, mixing and dropout."""
    precision: Precision = "fp32"
    """Autocast precision of the forward pass: fp32, bf16, or fp16 (GPU only, may overflow). Weights stay in fp32."""
    accumulate: int = field(default=1, metadata=FREE_ON_RESUME)  # the total batch is checked with the checkpoint
    """Gradient accumulation: steps per update of the weights. A step is one batch per process."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state across processes (FSDP2), for models too large for one GPU.
    Otherwise each process holds a full copy (DDP)."""
    cpu_threads: int | None = None
    """CPU threads per process for tensor operations; null: torch's default. 1 is fastest for small models."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE_ON_RESUME)
    trackers: list[str] = field(default_factory=list, metadata=FREE_ON_RESUME)
    """accelerate's trackers to log to, besides log.jsonl: tensorboard (writes to the run folder), wandb, trackio ..."""
    max_skipped: int = field(default=20, metadata=FREE_ON_RESUME)
    """The run stops after more than this many consecutive updates with a non-finite loss or gradient."""

    def __post_init__(self):
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be 0 or more, got {self.max_skipped}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.fsdp and self.precision == "fp16":
            raise ValueError("fsdp does not support precision fp16; choose bf16")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, got {self.cpu_threads}")

    def read_from(self, file: Path, given: Set[str]) -> None:
        """Let the configuration in a run folder refer to that folder, even if the folder was moved or copied."""
        in_run_folder = file.name == CONFIG_FILE and (file.parent / STARTS_FILE).exists()
        if in_run_folder and "run_dir" not in given:
            self.run_dir = str(file.parent)


@dataclass
class TrainConfig(RunConfig):
    """The run."""

    TOOL = "tools/train.py"

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self):
        super().__post_init__()
        if (early := len(self.data.early_sizes)) > self.schedule.epochs:
            raise ValueError(f"data.progressive has {early} epochs, more than schedule.epochs {self.schedule.epochs}")
        for name in ("mode", "alpha", "temperature"):
            if self.distill.teacher is None and getattr(self.distill, name) != getattr(DistillConfig, name):
                raise ValueError(f"distill.{name} needs a distill.teacher; set one, or leave distill.{name} out")
        if self.distill.mode == "hard" and self.distill.temperature != DistillConfig.temperature:
            raise ValueError("distill.temperature needs distill.mode soft; set that, or leave the temperature out")
        if (self.augment.mixup or self.augment.cutmix) and self.data.batch_size % 2:
            raise ValueError(f"mixup and cutmix need pairs: data.batch_size must be even, got {self.data.batch_size}")
