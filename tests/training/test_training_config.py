"""Configurations: no key is ignored or lost, and errors name the key."""

import re
from dataclasses import asdict, fields, is_dataclass

import pytest
import yaml

from vim.console import ConfigParser, RunError
from vim.console.free_on_resume import free_keys
from vim.detection import DetectionTrainConfig, DetectionValidateConfig
from vim.experiments.benchmark_config import BenchmarkConfig
from vim.experiments.comparison import CompareConfig
from vim.timm_models.config import ModelConfig
from vim.training import TrainConfig, ValidateConfig
from vim.training.averaging import EmaConfig
from vim.training.config import CheckpointConfig
from vim.training.distillation import DistillConfig
from vim.training.optim import OptimConfig, ScheduleConfig
from vim.training.run_folder import RunFolder


def parse(*args, config_class=TrainConfig):
    return ConfigParser(config_class, "").parse_config([str(arg) for arg in args])[0]


def error_of(capsys, *args, config_class=TrainConfig):
    with pytest.raises(SystemExit) as exit_:
        parse(*args, config_class=config_class)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def file(tmp_path):
    def write(**content):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_defaults_are_those_of_the_dataclasses():
    assert parse() == TrainConfig()
    assert parse(config_class=ValidateConfig) == ValidateConfig()


def test_a_saved_configuration_reads_back_the_same(file):
    kwargs = {"img_size": 28, "drop_path_rate": 0.1, "class_token": "middle"}
    config = parse("--optim.lr", 0.25, "--data.mean", "[0.5]", "--augment.scale", "[0.5, 1]", "--model.kwargs", kwargs)
    assert config.model.kwargs == kwargs  # numbers stay numbers
    assert config.augment.scale == (0.5, 1.0)
    assert parse("--config", file(**asdict(config))) == config


@pytest.mark.parametrize("order", [0, 1])
def test_an_override_wins_on_either_side_of_the_file(file, order):
    args = [["--config", file(optim={"lr": 0.1, "weight_decay": 0.2})], ["--optim.lr", 0.3]]
    config = parse(*args[order], *args[1 - order])
    assert (config.optim.lr, config.optim.weight_decay) == (0.3, 0.2)


def test_a_single_model_keyword_is_added_to_those_of_the_file(file):
    config = parse("--config", file(model={"kwargs": {"img_size": 28}}), "--model.kwargs.depth", 2)
    assert config.model.kwargs == {"img_size": 28, "depth": 2}


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"optim": {"weight_decy": 1}}, "unknown key 'optim.weight_decy' in {}; did you mean 'optim.weight_decay'"),
        ({"optm": {"lr": 1}}, "unknown key 'optm.lr' in {}; did you mean 'optim.lr'"),
        ({"seeed": 1}, "unknown key 'seeed' in {}; did you mean 'seed'"),
        ({"zzzzzz": 1}, "unknown key 'zzzzzz' in {}; see --help"),
    ],
)
def test_an_unknown_key_in_a_file_fails_with_a_hint(file, capsys, content, hint):
    path = file(**content)
    assert hint.format(path) in error_of(capsys, "--config", path)
    derived = path.with_name("derived.yaml")
    derived.write_text(f"base: {path.name}")
    assert hint.format(path) in error_of(capsys, "--config", derived)


@pytest.mark.parametrize("argument", ["--optim.weight_decy=1", "--optim.weight=1", "--optim.weight 1"])
def test_an_unknown_or_shortened_argument_fails_with_a_hint(capsys, argument):
    assert "did you mean 'optim.weight_decay'" in error_of(capsys, *argument.split())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr", -1, "optim.lr must be positive, got -1"),
        ("optim.clip_grad", 0, "optim.clip_grad must be positive, or null"),
        ("data.batch_size", 0, "data.batch_size must be at least 1, got 0"),
        ("data.cache_gib", 0, "data.cache_gib must be positive, or null for no limit, got 0"),
        ("data.window", 0, "data.window must be at least 1 shard, got 0"),
        ("data.crop_pct", 87.5, "data.crop_pct must be above 0 and at most 1, got 87.5"),
        ("augment.hflip", 2, "augment.hflip is a probability"),
        ("augment.scale", "[1.0, 0.5]", "augment.scale must be (low, high)"),
        ("augment.smoothing", 1, "augment.smoothing must be at least 0 and below 1"),
        ("schedule.warmup_epochs", 300, "schedule.warmup_epochs must be in 0 .. epochs 300, got 300"),
        ("ema.decay", 1, "ema.decay must be at least 0 and below 1"),
        (
            "data.progressive",
            "[[128, 0]]",
            "want at least 1 pixel and 1 epoch in each pair, got [128, 0]",
        ),
        (
            "data.progressive",
            "[[128, 200], [160, 101]]",
            "data.progressive has 301 epochs, more than schedule.epochs 300",
        ),
        ("distill.alpha", 1.5, "distill.alpha must be in 0 .. 1, got 1.5"),
        ("distill.temperature", 0, "distill.temperature must be positive, got 0"),
        ("distill.checkpoint", "x.pth", "distill.checkpoint and distill.kwargs need a distill.teacher"),
        ("distill.kwargs.num_classes", 3, "num_classes could give the teacher an untrained head"),
        ("distill.mode", "soft", "distill.mode needs a distill.teacher; set one, or leave distill.mode out"),
        ("ema.warmup", "true", "ema.warmup needs ema.decay above 0; set both"),
        ("augment.erasing_mode", "const", "augment.erasing_mode has no effect without augment.erasing"),
        ("augment.mix_prob", 0.5, "augment.mix_prob has no effect without augment.mixup or augment.cutmix"),
        ("accumulate", 0, "accumulate must be at least 1"),
        ("precision", "fp8", "precision"),
        ("optim.lr", "fast", "optim.lr"),
    ],
)
def test_a_bad_value_fails_before_anything_runs(capsys, key, value, message):
    assert message in error_of(capsys, f"--{key}", value)


TEACHER = {"teacher": "resnet18"}
COMPARED = {"contenders": {"a": {}}}


@pytest.mark.parametrize(
    ("kind", "allowed", "refused", "message"),
    [
        (ModelConfig, {"pretrained": False, "checkpoint": "x"}, {"pretrained": True, "checkpoint": "x"}, "give one of"),
        (OptimConfig, {"lr": 1e-9}, {"lr": 0}, "optim.lr must be positive, got 0"),
        (OptimConfig, {"lr_batch": 1}, {"lr_batch": 0}, "optim.lr_batch must be at least 1 image, got 0"),
        (OptimConfig, {"weight_decay": 0}, {"weight_decay": -1e-9}, "optim.weight_decay must be 0 or more"),
        (OptimConfig, {"layer_decay": 1}, {"layer_decay": 1.01}, "optim.layer_decay must be above 0 and at most 1"),
        (OptimConfig, {"layer_decay": 0.01}, {"layer_decay": 0}, "optim.layer_decay must be above 0"),
        (OptimConfig, {"clip_grad": 1e-9}, {"clip_grad": 0}, "optim.clip_grad must be positive, or null"),
        (ScheduleConfig, {"epochs": 1, "warmup_epochs": 0}, {"epochs": 0}, "schedule.epochs must be at least 1, got 0"),
        (ScheduleConfig, {"warmup_epochs": 299.9}, {"warmup_epochs": 300}, "warmup_epochs must be in 0 .. epochs 300"),
        (ScheduleConfig, {"warmup_epochs": 0}, {"warmup_epochs": -0.1}, "schedule.warmup_epochs must be in 0 .."),
        (ScheduleConfig, {"steps": [5, 299.9]}, {"steps": [4.9]}, "schedule.steps must lie between warmup_epochs and"),
        (
            ScheduleConfig,
            {"steps": []},
            {"steps": [5, 300]},
            "schedule.steps must lie between warmup_epochs and epochs",
        ),
        (ScheduleConfig, {"min_lr": 1e-4}, {"min_lr": 1e-4, "steps": [9]}, "which schedule.steps replaces"),
        (ScheduleConfig, {"min_lr": 0}, {"min_lr": -1e-9}, "schedule.min_lr must be 0 or more"),
        (ScheduleConfig, {"warmup_lr": 0}, {"warmup_lr": -1e-9}, "schedule.warmup_lr must be 0 or more"),
        (EmaConfig, {"decay": 0.9999}, {"decay": 1}, "ema.decay must be at least 0 and below 1, got 1"),
        (EmaConfig, {"decay": 0}, {"decay": -0.1}, "ema.decay must be at least 0"),
        (EmaConfig, {"decay": 0.1, "warmup": True}, {"warmup": True}, "ema.warmup needs ema.decay above 0"),
        (DistillConfig, TEACHER | {"checkpoint": "x"}, {"checkpoint": "x"}, "need a distill.teacher; set one"),
        (DistillConfig, TEACHER | {"kwargs": {"a": 1}}, {"kwargs": {"a": 1}}, "need a distill.teacher; set one"),
        (DistillConfig, {"alpha": 1}, {"alpha": 1.01}, "distill.alpha must be in 0 .. 1, got 1.01"),
        (DistillConfig, {"alpha": 0}, {"alpha": -0.01}, "distill.alpha must be in 0 .. 1, got -0.01"),
        (DistillConfig, {"temperature": 1e-9}, {"temperature": 0}, "distill.temperature must be positive, got 0"),
        (CheckpointConfig, {"every_minutes": 1e-9}, {"every_minutes": 0}, "checkpoint.every_minutes must be positive"),
        (CheckpointConfig, {"every_updates": 1}, {"every_updates": 0}, "checkpoint.every_updates must be at least 1"),
        (CheckpointConfig, {"keep": 0}, {"keep": -1}, "checkpoint.keep must be 0 or more, got -1"),
        (TrainConfig, {"max_skipped": 0}, {"max_skipped": -1}, "max_skipped must be 0 or more, got -1"),
        (TrainConfig, {"seed": 0}, {"seed": -1}, "seed must be 0 or more, got -1"),
        (TrainConfig, {"accumulate": 1}, {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        (TrainConfig, {"cpu_threads": 1}, {"cpu_threads": 0}, "cpu_threads must be at least 1, got 0"),
        (
            TrainConfig,
            {"fsdp": True},
            {"fsdp": True, "precision": "fp16"},
            "fsdp does not support precision fp16",
        ),
        (
            TrainConfig,
            {"distill": DistillConfig("resnet18", mode="soft", temperature=2)},
            {"distill": DistillConfig("resnet18", temperature=2)},
            "distill.temperature needs distill.mode soft",
        ),
        (TrainConfig, {}, {"distill": DistillConfig(alpha=0.1)}, "distill.alpha needs a distill.teacher"),
        (ValidateConfig, {"img_sizes": [1]}, {"img_sizes": [9, 0]}, "img_sizes must be at least 1 pixel, got [9, 0]"),
        (ValidateConfig, {"crop_pcts": [1]}, {"crop_pcts": [1, 1.01]}, "crop_pcts must be above 0 and at most 1"),
        (ValidateConfig, {"crop_pcts": [0.01]}, {"crop_pcts": [0]}, "crop_pcts must be above 0 and at most 1"),
        (BenchmarkConfig, {"rounds": 1}, {"rounds": 0}, "rounds must be at least 1, got 0"),
        (BenchmarkConfig, {"threads": 1}, {"threads": 0}, "threads must be at least 1, got 0"),
        (BenchmarkConfig, {"seconds": 1e-9}, {"seconds": 0}, "seconds must be positive, got 0"),
        (CompareConfig, COMPARED | {"jobs": 1}, COMPARED | {"jobs": 0}, "jobs must be at least 1, got 0"),
        (
            CompareConfig,
            COMPARED,
            {"contenders": {"a": {"seed": 1, "run_dir": "x"}}},
            "contenders.a sets run_dir, seed",
        ),
        (CompareConfig, COMPARED | {"seeds": [1]}, COMPARED | {"seeds": []}, "must name at least one each"),
    ],
)
def test_a_limit_is_where_it_is_said_to_be(kind, allowed, refused, message):
    kind(**allowed)
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**refused)


def test_mixing_needs_pairs(capsys):
    assert "data.batch_size must be even, got 7" in error_of(capsys, "--augment.mixup", 0.8, "--data.batch_size", 7)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--img_sizes", "[224]", "--data.img_size", 288], "img_sizes and data.img_size are both given"),
        (["--crop_pcts", "[0.9]", "--data.crop_pct", 1], "crop_pcts and data.crop_pct are both given"),
        (["--img_sizes", "[224, 0]"], "img_sizes must be at least 1 pixel, got [224, 0]"),
        (["--crop_pcts", "[0.9, 1.1]"], "crop_pcts must be above 0 and at most 1, got [0.9, 1.1]"),
        (["--labels", "imagenet-x"], "labels"),
    ],
)
def test_a_bad_evaluation_fails_before_anything_runs(capsys, args, message):
    assert message in error_of(capsys, *args, config_class=ValidateConfig)


FREE_ON_RESUME = {
    "run_dir",
    "accumulate",
    "trackers",
    "max_skipped",
    "checkpoint.every_minutes",
    "checkpoint.every_updates",
    "checkpoint.keep",
    "data.root",
    "data.batch_size",
    "data.num_workers",
    "data.bad_images",
}


@pytest.mark.parametrize(
    ("config_class", "free"),
    [(TrainConfig, FREE_ON_RESUME | {"data.cache_gib"}), (DetectionTrainConfig, FREE_ON_RESUME)],
)
def test_a_resumed_run_may_change_what_leaves_results_alone(tmp_path, config_class, free):
    assert free_keys(config_class) == free
    folder, config = RunFolder(tmp_path, config_class.TOOL), config_class()
    folder.write_config(config)
    for key in leaves(config_class):
        changed = config_class()
        *section, name = key.split(".")
        setattr(getattr(changed, section[0]) if section else changed, name, "changed")
        if key in free:
            folder.check(changed, resume=True)
        else:
            with pytest.raises(RunError, match=f"a resumed run keeps its configuration, but {key} was .*'changed'"):
                folder.check(changed, resume=True)


def leaves(config_class, prefix=""):
    for f in fields(config_class):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


@pytest.mark.parametrize("config_class", [TrainConfig, ValidateConfig, DetectionTrainConfig, DetectionValidateConfig])
def test_help_explains_every_field_in_a_line(config_class):
    lines = ConfigParser(config_class, "").format_help().splitlines()
    for key in leaves(config_class):
        line = next(line for line in lines if line.startswith(f"  --{key} "))
        assert len(line.split()) > 2, f"{key} has no docstring"
    assert len(lines) < 100
