"""Configuration of a benchmark: models, workloads, rounds."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from jsonargparse.typing import register_type

from vim.console.errors import ConfigError, did_you_mean
from vim.timm_models.precision import Precision


@dataclass(frozen=True)
class Contender:
    """A model of a benchmark and how it runs, written `name+option+option`."""

    OPTIONS = ("checkpoint", "compile", "graph", "materialised")

    model: str
    """Any timm model."""
    options: tuple[str, ...] = ()
    """checkpoint: activations are recomputed in the backward pass. compile: torch.compile. graph: the whole step is one
    CUDA graph. materialised: attention without flash."""

    @classmethod
    def parse(cls, text: str) -> "Contender":
        model, *options = text.split("+")
        for option in options:
            if option not in cls.OPTIONS:
                hint = did_you_mean(option, cls.OPTIONS, f"there are {', '.join(cls.OPTIONS)}")
                raise ConfigError(f"models: unknown option {option!r} in {text!r}{hint}")
        if len(set(options)) < len(options):
            raise ConfigError(f"models: an option stands twice in {text!r}")
        return cls(model, tuple(options))

    def __str__(self) -> str:
        return "+".join((self.model, *self.options))


@dataclass(frozen=True)
class Workload:
    """What the models of a benchmark have to do."""

    mode: Literal["inference", "train"] = "inference"
    """inference: a forward pass. train: forward and backward pass and update."""
    img_size: int = 224
    """Height and width of the images, in pixels."""
    batch_size: int = 8
    """Images in a step."""
    models: list[str] | None = None
    """The models that take part, as written in the benchmark's models; null for all."""

    def __post_init__(self):
        if self.mode not in ("inference", "train"):
            raise ConfigError(f"mode must be inference or train, got {self.mode!r}")
        for name in ("img_size", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a number of at least 1, got {value!r}")
        if self.models is not None and not (self.models and isinstance(self.models, list)):
            raise ConfigError(f"models must be a list of names, or null for all, got {self.models!r}")

    @classmethod
    def parse(cls, entry: Any) -> "Workload":
        known = [f.name for f in fields(cls)]
        if not isinstance(entry, dict):
            raise ConfigError(f"{entry!r} is none; give it {', '.join(known)}")
        for key in entry:
            if key not in known:
                raise ConfigError(f"unknown key {key!r}{did_you_mean(key, known, f'there are {known}')}")
        return cls(**entry)


# A value, not a section: jsonargparse would want a parser for a dataclass in a list, and ConfigParser makes none.
register_type(Workload, serializer=asdict, deserializer=Workload.parse)


@dataclass
class BenchmarkConfig:
    """The benchmark."""

    models: list[str] = field(default_factory=lambda: ["vim_tiny", "deit_tiny_patch16_224"])
    """Timm models, each with options: name, name+compile, +graph (a CUDA graph), +checkpoint (activations recomputed),
    +materialised (no flash attention)."""
    workloads: list[Workload] = field(default_factory=lambda: [Workload("inference"), Workload("train")])
    """What they do: list of mode (inference or train), img_size (pixels), batch_size (images), models (null: all)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    precision: Precision = "bf16"
    """Of the forward pass, by autocast; weights stay fp32."""
    rounds: int = 5
    """Repetitions of a measurement; the median of them counts."""
    seconds: float = 1.0
    """Length of a round, in seconds."""
    threads: int | None = None
    """Threads of tensor operations on the CPU; null for torch's choice."""
    output: str = "runs/benchmark"
    """Folder for benchmark.json and benchmark.png; those of an earlier benchmark are overwritten."""

    def __post_init__(self):
        if not self.models or not self.workloads:
            raise ConfigError("models and workloads must name at least one each")
        for text in self.models:
            Contender.parse(text)
            if self.models.count(text) > 1:
                raise ConfigError(f"models: {text!r} stands there twice")
        for workload in self.workloads:
            for text in workload.models or ():
                if text not in self.models:
                    hint = did_you_mean(text, self.models, "it must be one of the benchmark's models")
                    raise ConfigError(f"workloads: no model {text!r} to take part{hint}")
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
