"""The configurations of training, evaluation and benchmark; every field is read, and explained in `--help`."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from jsonargparse.typing import register_type

from vim.data import AugmentConfig, DataConfig, EvalDataConfig

from .errors import ConfigError, did_you_mean

Precision = Literal["fp32", "bf16", "fp16"]
LabelSet = Literal["folder", "imagenet-v2", "imagenet-real", "imagenet-a", "imagenet-r"]


@dataclass
class ModelConfig:
    """Which model, and from which weights it starts."""

    name: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    pretrained: bool | None = None
    """Start from the model's released weights, or those of the folder or repository. null: from the latter only."""
    checkpoint: str | None = None
    """Start from this file: official weights, a run's checkpoint, safetensors. All must fit, but for the head where
    classes differ."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model: img_size, patch_size, in_chans, depth, drop_path_rate ..."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graph: bool = True
    """Replay training steps as CUDA graphs: launching small kernels one by one can take longer than running them. On
    GPUs, without accumulate, compile, fsdp and, but for Vim, grad_checkpointing; else without effect."""

    def __post_init__(self):
        if self.pretrained and self.checkpoint:
            raise ValueError("model.pretrained and model.checkpoint both name weights to start from; give one of them")


@dataclass
class OptimConfig:
    """Optimizer. Weight decay spares one-dimensional parameters and those of the model's no_weight_decay()."""

    name: str = "adamw"
    """Any timm optimizer."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_batch: int | None = None
    """Total batch size that lr is meant for; lr is scaled by total batch / lr_batch. null: lr is taken as it is."""
    weight_decay: float = 0.05
    """Decay for each update, in units of the learning rate."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below, 0..1; null: the same rate for all layers."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient; null for no clipping."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the optimizer: betas, eps, momentum ..."""

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if self.lr_batch is not None and self.lr_batch < 1:
            raise ValueError(f"optim.lr_batch must be at least 1 image, got {self.lr_batch}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must be 0 or more, got {self.weight_decay}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be above 0 and at most 1, or null, got {self.layer_decay}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"optim.clip_grad must be positive, or null for no clipping, got {self.clip_grad}")


@dataclass
class ScheduleConfig:
    """Learning rate for each update: a linear rise to optim.lr, then a cosine down to min_lr, or steps."""

    epochs: int = 300
    """Length of the run."""
    warmup_epochs: float = 5.0
    """Length of the rise; part of epochs, fractions allowed."""
    warmup_lr: float = 1e-6
    """Learning rate of the first update."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    steps: list[float] | None = None
    """Instead of the cosine: a tenth of the rate from each of these epochs on, fractions allowed; null: the cosine."""

    def __post_init__(self):
        if self.steps is not None and not all(self.warmup_epochs <= s < self.epochs for s in self.steps):
            raise ValueError(f"schedule.steps must lie between warmup_epochs and epochs, got {self.steps}")
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be in 0 .. epochs {self.epochs}, got {self.warmup_epochs}")
        if self.steps is not None and self.min_lr != ScheduleConfig.min_lr:
            raise ValueError("schedule.min_lr ends the cosine, which schedule.steps replace; give one of them")
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must be 0 or more, got {getattr(self, name)}")


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated and saved beside them."""

    decay: float = 0.0
    """Part of the average that an update keeps; 0 for no average."""
    warmup: bool = False
    """Keep less at first, 1 - n ** (-2/3) at update n up to decay, so that a short run's average forgets its start."""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {self.decay}")
        if self.warmup and not self.decay:
            raise ValueError("ema.warmup belongs to an average; give an ema.decay above 0 too, or leave it out")


@dataclass
class DistillConfig:
    """A trained model as teacher. The loss is (1 - alpha) x that of the labels + alpha x that of the teacher."""

    teacher: str | None = None
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>; null for none."""
    checkpoint: str | None = None
    """File of the teacher's weights; null for its released weights, or those of the folder."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model for the teacher, for example img_size."""
    mode: Literal["soft", "hard"] = "hard"
    """Learn the teacher's probabilities (soft: Hinton et al. 2015), or its most probable class (hard: DeiT)."""
    alpha: float = 0.5
    """Weight of the teacher, 0..1."""
    temperature: float = 3.0
    """soft: logits of both models are divided by it; above 1 more is learned of the less probable classes."""

    def __post_init__(self):
        if "num_classes" in self.kwargs:
            raise ValueError(
                "distill.kwargs.num_classes could give the teacher a new head that knows nothing; leave it out, and "
                "train the teacher on the data set's classes first"
            )
        if self.teacher is None and (self.checkpoint or self.kwargs):
            raise ValueError("distill.checkpoint and distill.kwargs belong to a distill.teacher; name one")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"distill.alpha must be in 0 .. 1, got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature must be positive, got {self.temperature}")


@dataclass
class CheckpointConfig:
    """When the state of the run is saved, besides the end of every epoch and a SIGTERM or Ctrl-C."""

    every_minutes: float | None = 10.0
    """Minutes between checkpoints; null for none by time."""
    every_updates: int | None = None
    """Updates between checkpoints; null for none by count."""
    keep: int = 0
    """Also keep the checkpoints of so many epochs, the best ones, as epoch-<number>.pt."""

    def __post_init__(self):
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes must be positive, or null, got {self.every_minutes}")
        if self.every_updates is not None and self.every_updates < 1:
            raise ValueError(f"checkpoint.every_updates must be at least 1, or null, got {self.every_updates}")
        if self.keep < 0:
            raise ValueError(f"checkpoint.keep must be 0 or more, got {self.keep}")


@dataclass
class RunConfig:
    """What every kind of training has."""

    TOOL: ClassVar[str]  # that reads this configuration

    run_dir: str = "runs/train"
    """Folder to write; must be new, or hold the run to resume."""
    seed: int = 0
    """Of initial weights, order, augmentation, mixing and dropout."""
    precision: Precision = "fp32"
    """Of the forward pass, by autocast; weights stay fp32. fp16 needs a GPU, and may overflow where bf16 does not."""
    accumulate: int = 1
    """Steps whose gradients make one update."""
    fsdp: bool = False
    """Divide parameters, gradients and the optimizer's state among the processes (FSDP2), for models that one GPU
    cannot hold; otherwise each process has them all (DDP)."""
    cpu_threads: int | None = None
    """Threads of tensor operations on the CPU, for each process; null for torch's choice. Small models want 1."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: list[str] = field(default_factory=list)
    """Where to log epochs besides log.jsonl, by accelerate: tensorboard (into the run folder), wandb, trackio ..."""
    max_skipped: int = 20
    """Updates in a row that may be left out because loss or gradient are not finite; one more stops the run."""

    def __post_init__(self):
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be 0 or more, got {self.max_skipped}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.fsdp and self.precision == "fp16":
            raise ValueError("fsdp and precision fp16 do not go together; choose bf16")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, got {self.cpu_threads}")


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
                raise ValueError(f"distill.{name} belongs to a distill.teacher; name one, or leave it out")
        if self.distill.mode == "hard" and self.distill.temperature != DistillConfig.temperature:
            raise ValueError("distill.temperature is for distill.mode soft; give that, or leave it out")
        if (self.augment.mixup or self.augment.cutmix) and self.data.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs: data.batch_size must be even, got {self.data.batch_size}")


@dataclass
class LoadedModelConfig:
    """A model as it is, with its classes and its weights, for the tools that do not train."""

    model: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    checkpoint: str | None = None
    """File of weights; null for the model's released weights, or those of the folder."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, for example img_size."""


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


@dataclass
class GenerateConfig:
    """Text from a language model."""

    prompts: list[str]
    """Texts to go on from, at once."""
    model: str = "state-spaces/mamba-130m"
    """Folder with config.json and weights, or a repository on the Hugging Face hub."""
    tokenizer: str | None = None
    """File tokenizer.json, or folder or hub repository with one; null: the model's, else EleutherAI/gpt-neox-20b."""
    max_new_tokens: int = 100
    """At most, after each prompt."""
    temperature: float = 0.0
    """Logits are divided by it before sampling; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among so many likeliest tokens; null for all."""
    top_p: float | None = None
    """Sample among the fewest tokens that have this probability together, 0..1; null for all."""
    seed: int = 0
    """Of the sampling."""
    precision: Precision = "fp32"
    """Of weights and activations; states of the scan are fp32."""
    device: str | None = None
    """cpu, cuda ...; null for the GPU if there is one."""

    def __post_init__(self):
        if not self.prompts or not all(self.prompts):
            raise ValueError(f"prompts must be one text or more, none of them empty, got {self.prompts}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or null for all tokens, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or null for all tokens, got {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {self.seed}")


@dataclass
class PushConfig:
    """The upload of a finished run to the Hugging Face hub."""

    run_dir: str
    """Folder of a finished run of tools/train.py."""
    repo: str
    """Repository on the hub, owner/name; made if it is not there."""
    license: str
    """Of the weights, as the hub abbreviates it: apache-2.0, cc-by-nc-4.0 ... Images and first weights have a say."""
    datasets: list[str] = field(default_factory=list)
    """Names on the hub of the data sets that it was trained on, the one evaluated on first: ylecun/mnist ..."""
    weights: Literal["last", "ema"] = "last"
    """last: those after the last epoch. ema: their moving average."""
    private: bool = False
    """Nobody else sees the repository. One that is there and public is refused."""
    output: str | None = None
    """Only write the files, to this new folder; null: push them."""

    def __post_init__(self):
        if not self.license.strip():
            raise ValueError("license must not be empty; who publishes weights says how others may use them")


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


@dataclass
class CompareConfig:
    """The comparison."""

    train: str = "configs/quickstart.yaml"
    """Configuration of the training, the same for all; data.val_split is the split to choose the learning rate on."""
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of each, and what it changes in that configuration: {vim: {model.name: vim_nano}}."""
    lrs: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3])
    """Learning rates to choose from, the same for all."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of the runs that are tested; learning rates are chosen with the first."""
    test_split: str = "test"
    """Folder below data.root that nothing is chosen on."""
    jobs: int = 1
    """Runs side by side."""
    output: str = "runs/comparison"
    """Folder for the runs, comparison.json and comparison.png. What is finished there is not done again."""

    def __post_init__(self):
        if not self.contenders or not self.lrs or not self.seeds:
            raise ConfigError("contenders, lrs and seeds must name at least one each")
        for name, changes in self.contenders.items():
            if taken := {"optim.lr", "seed", "run_dir"} & changes.keys():
                raise ConfigError(
                    f"contenders.{name} sets {', '.join(sorted(taken))}, which the comparison sets itself"
                )
        if self.jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {self.jobs}")
