"""Configuration of a benchmark: models, workloads, rounds."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from jsonargparse.typing import register_type

from vim.console.errors import ConfigError, did_you_mean
from vim.timm_models.precision import Precision


@dataclass(frozen=True)
class Contender:
    """A model in a benchmark and how it runs, written `name+option+option`."""

    OPTIONS = ("checkpoint", "compile", "graph", "materialised")

    model: str
    """Any timm model."""
    options: tuple[str, ...] = ()
    """checkpoint: activation checkpointing. compile: torch.compile. graph: the whole step is one CUDA graph.
    materialised: no flash attention."""

    @classmethod
    def parse(cls, text: str) -> "Contender":
        model, *options = text.split("+")
        for option in options:
            if option not in cls.OPTIONS:
                hint = did_you_mean(option, cls.OPTIONS, f"options are {', '.join(cls.OPTIONS)}")
                raise ConfigError(f"models: unknown option {option!r} in {text!r}{hint}")
        if len(set(options)) < len(options):
            raise ConfigError(f"models: duplicate option in {text!r}; name each option once")
        return cls(model, tuple(options))

    def __str__(self) -> str:
        return "+".join((self.model, *self.options))


@dataclass(frozen=True)
class Workload:
    """The task that is timed."""

    mode: Literal["inference", "train"] = "inference"
    """inference: forward pass. train: forward pass, backward pass and optimizer update."""
    img_size: int = 224
    """Height and width of the images, in pixels."""
    batch_size: int = 8
    """Images per step."""
    models: list[str] | None = None
    """Models to measure, written as in the benchmark's models; null: all."""

    def __post_init__(self):
        if self.mode not in ("inference", "train"):
            raise ConfigError(f"mode must be inference or train, got {self.mode!r}")
        for name in ("img_size", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.models is not None and not (self.models and isinstance(self.models, list)):
            raise ConfigError(f"models must be a list of names, or null for all, got {self.models!r}")

    @classmethod
    def parse(cls, entry: Any) -> "Workload":
        known = [f.name for f in fields(cls)]
        if not isinstance(entry, dict):
            raise ConfigError(f"a workload must be a mapping with the keys {', '.join(known)}, got {entry!r}")
        for key in entry:
            if key not in known:
                raise ConfigError(f"unknown key {key!r}{did_you_mean(key, known, f'keys are {known}')}")
        return cls(**entry)


# Registered as a value: for a dataclass in a list jsonargparse would need a parser, which ConfigParser does not make.
register_type(Workload, serializer=asdict, deserializer=Workload.parse)


@dataclass
class BenchmarkConfig:
    """The benchmark."""

    models: list[str] = field(default_factory=lambda: ["vim_tiny", "deit_tiny_patch16_224"])
    """timm models with options: name, name+compile (torch.compile), +graph (CUDA graph), +checkpoint (activation
    checkpointing), +materialised (no flash attention)."""
    workloads: list[Workload] = field(default_factory=lambda: [Workload("inference"), Workload("train")])
    """What to time: list of mode (inference or train), img_size (pixels), batch_size (images), models (null: all)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """cuda, cpu, or auto: the GPU if there is one."""
    precision: Precision = "bf16"
    """Autocast precision of the forward pass: fp32, bf16, or fp16 (inference only). Weights stay in fp32."""
    rounds: int = 5
    """Rounds per measurement; the median is reported."""
    seconds: float = 1.0
    """Length of a round in seconds."""
    threads: int | None = None
    """CPU threads for tensor operations; null: torch's default."""
    peer: str | None = None
    """Model, without options, that the table's ratios are relative to; null: the first one of each workload."""
    top1: dict[str, float] = field(default_factory=dict)
    """Reported ImageNet top-1 in percent by model, for the table and the plot."""
    resume: bool = False
    """Keep the measurements in the output folder and make those that are missing."""
    output: str = "runs/benchmark"
    """Folder for benchmark.json and benchmark.png; existing ones are overwritten."""

    def __post_init__(self):
        if not self.models or not self.workloads:
            raise ConfigError("models and workloads must name at least one each")
        for text in self.models:
            Contender.parse(text)
            if self.models.count(text) > 1:
                raise ConfigError(f"models: duplicate {text!r}; name each model once")
        for workload in self.workloads:
            for text in workload.models or ():
                if text not in self.models:
                    hint = did_you_mean(text, self.models, "it must be one of the benchmark's models")
                    raise ConfigError(f"workloads: unknown model {text!r}{hint}")
            if workload.mode == "train" and self.precision == "fp16":
                raise ConfigError("precision fp16 is for inference: training would need loss scaling; choose bf16")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")
        if not self.seconds > 0:
            raise ConfigError(f"seconds must be positive, got {self.seconds}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")

    def plan(self) -> list[tuple[Workload, Contender]]:
        """Every measurement, in order."""
        return [
            (workload, Contender.parse(text))
            for workload in self.workloads
            for text in self.models
            if text in (workload.models or self.models)
        ]
