"""Compares how well models learn, each with its own best learning rate."""

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vim.console.config_parser import ConfigParser
from vim.console.errors import ConfigError, RunError
from vim.console.exits import plain_errors
from vim.console.progress import Progress
from vim.data import EvalDataConfig
from vim.files import write_json
from vim.training.config import TrainConfig
from vim.training.run import train
from vim.training.validation import ValidateConfig, validate

from .plots import plot_comparison


@dataclass
class CompareConfig:
    """The comparison."""

    train: str = "configs/quickstart.yaml"
    """Training configuration (YAML file) of all contenders. Learning rates are chosen on its data.val_split."""
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Names of the contenders, each with its changes to that configuration: {vim: {model.name: vim_nano}}."""
    lrs: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3])
    """Learning rates to try for each contender."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the tested runs. The learning rate is chosen with the first seed."""
    test_split: str = "test"
    """Held-out split to test on; a folder below data.root."""
    jobs: int = 1
    """Number of runs in parallel."""
    output: str = "runs/comparison"
    """Folder for the runs, comparison.json and comparison.png. Finished runs in it are not repeated."""

    def __post_init__(self):
        if not self.contenders or not self.lrs or not self.seeds:
            raise ConfigError("contenders, lrs and seeds must name at least one each")
        for name, changes in self.contenders.items():
            if taken := {"optim.lr", "seed", "run_dir"} & changes.keys():
                keys = ", ".join(sorted(taken))
                raise ConfigError(f"contenders.{name} sets {keys}, which the comparison sets itself; leave it out")
        if self.jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {self.jobs}")


@dataclass(frozen=True)
class _Run:
    """A training run of a comparison."""

    contender: str
    lr: float
    seed: int

    def folder(self, config: CompareConfig) -> Path:
        return Path(config.output) / self.contender / f"lr{self.lr:g}-seed{self.seed}"

    def log(self, config: CompareConfig) -> Path:
        folder = self.folder(config)
        return folder.with_name(f"{folder.name}.txt")


def compare(config: CompareConfig) -> dict[str, Any]:
    """Choose the best learning rate of each contender, then train it with every seed and test it.

    The best learning rate has the highest top-1 on data.val_split after the last epoch, with the first seed. A stopped
    comparison can be called again: it skips finished runs and resumes unfinished ones.

    Returns: the content of comparison.json: for each contender its parameters, validation top-1 by learning rate, the
        chosen learning rate, and test top-1 by seed with mean and standard deviation, in percent.
    Raises: RunError for a run that failed.
    """
    for contender in config.contenders:
        _check_splits(config, contender)
    progress, first = Progress(), config.seeds[0]
    grid = {name: [_Run(name, lr, first) for lr in config.lrs] for name in config.contenders}
    _train_all(config, [run for runs in grid.values() for run in runs], progress)
    chosen = {name: max(runs, key=lambda run: _summary(config, run)["top1"]) for name, runs in grid.items()}
    final = {name: [_Run(name, run.lr, seed) for seed in config.seeds] for name, run in chosen.items()}
    _train_all(config, [run for runs in final.values() for run in runs], progress)
    results = {}
    for name, runs in final.items():
        tested = [_test(config, run) for run in runs]
        results[name] = {
            "parameters": _summary(config, runs[0])["parameters"],
            "choosing": {f"{run.lr:g}": _summary(config, run)["top1"] for run in grid[name]},
            "lr": runs[0].lr,
            "test": tested,
            "mean": statistics.mean(tested),
            "deviation": statistics.stdev(tested) if len(tested) > 1 else None,
            "train_seconds": statistics.mean(_summary(config, run)["train_seconds"] for run in runs),
        }
    about = {"train": config.train, "seeds": config.seeds, "test_split": config.test_split}
    summary = _summary(config, final[next(iter(final))][0])
    report = about | {"device": summary["device"], "versions": summary["versions"], "contenders": results}
    write_json(report, Path(config.output) / "comparison.json")
    progress.line(plot_comparison(report, Path(config.output) / "comparison.png"))
    return report


def _check_splits(config: CompareConfig, contender: str) -> None:
    """Raise ConfigError if the test split is also used for training or validation."""
    changes = _arguments(config.contenders[contender])
    run, _ = ConfigParser(TrainConfig, "").parse_config(["--config", config.train, *changes])
    for name in ("train_split", "val_split"):
        if getattr(run.data, name) == config.test_split:
            raise ConfigError(
                f"test_split {config.test_split!r} is data.{name} of {contender}; a test split must not be used for "
                "training or for choosing the learning rate: choose another split"
            )


def _train_all(config: CompareConfig, runs: Iterable[_Run], progress: Progress) -> None:
    def train_one(run: _Run) -> None:
        folder = run.folder(config)
        if (folder / "summary.json").exists():
            return
        overrides = config.contenders[run.contender] | {"optim.lr": run.lr, "seed": run.seed, "run_dir": str(folder)}
        _in_a_process(_train, ["--config", config.train, *_arguments(overrides)], run.log(config))
        progress.line(f"{folder}: validation top-1 {_summary(config, run)['top1']:.2f} %")

    with ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(train_one, runs))


def _test(config: CompareConfig, run: _Run) -> float:
    """Top-1 on the test split, in percent."""
    folder = run.folder(config)
    output = folder / f"{config.test_split}.json"
    if not output.exists():
        trained = yaml.safe_load((folder / "config.yaml").read_text())["data"]
        # Image size and crop come from the model.
        loading = {key: trained[key] for key in ("batch_size", "num_workers", "bad_images", "cache_gib")}
        data = EvalDataConfig(trained["root"], config.test_split, **loading)
        test = ValidateConfig(str(folder), data=data, output=str(output))
        _in_a_process(validate, test, run.log(config))
    return json.loads(output.read_text())["top1"]


def _summary(config: CompareConfig, run: _Run) -> dict[str, Any]:
    return json.loads((run.folder(config) / "summary.json").read_text())


def _arguments(overrides: dict[str, Any]) -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def _train(arguments: list[str]) -> None:
    config, _ = ConfigParser(TrainConfig, "").parse_config(arguments)
    train(config, resume=(Path(config.run_dir) / "config.yaml").exists())


def _in_a_process(function: Callable[[Any], Any], argument: Any, log: Path) -> None:
    """Call a function in a new process, because accelerate and CUDA have global state. Log its output to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_logged, args=(function, argument, log))
    process.start()
    process.join()
    if process.exitcode:
        raise RunError(f"a run failed with exit code {process.exitcode}; see {log}")


def _logged(function: Callable[[Any], Any], argument: Any, log: Path) -> None:
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file), plain_errors():
        function(argument)
