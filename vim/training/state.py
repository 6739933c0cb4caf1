"""The state of a run between two updates: the content of a checkpoint."""

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from vim.console.errors import RunError

from .data_record import check_same_data
from .sharding import gathered, load_whole, own_pieces, scatter_optimizer_state


@dataclass
class EpochSoFar:
    """Progress and statistics of the current epoch.

    images: images seen, over all processes. updates: updates made. loss: sum of the mean losses of these updates.
    skipped: updates skipped because of a non-finite loss or gradient. skipped_in_row: updates skipped since the last
    one that was made. lr: learning rate of the last update. seconds: training time. waited: the part of it in which
    this process waited for its dataloader.
    """

    images: int = 0
    updates: int = 0
    loss: float = 0.0
    skipped: int = 0
    skipped_in_row: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def mean_loss(self) -> float:
        """NaN if no update was made."""
        return self.loss / self.updates if self.updates else math.nan


@dataclass(frozen=True)
class UpdateSplit:
    """How the images of an update are split into batches.

    Another split rounds sums differently, and uses other batches for mixing, batch norm and dropout.
    """

    batch_size: int
    processes: int
    accumulate: int

    @property
    def total_batch(self) -> int:
        return self.batch_size * self.processes * self.accumulate

    def check(self, saved: "UpdateSplit") -> str | None:
        """Returns: a warning if a run resumes with another number of processes.

        Raises: RunError if the number of images per update differs, or the split although the processes are the same.
        """
        if saved.total_batch != self.total_batch:
            raise RunError(
                f"the run has {saved.total_batch} images per update, but would resume with {self.total_batch}; choose "
                f"data.batch_size x accumulate x number of processes = {saved.total_batch}"
            )
        if saved == self:
            return None
        if saved.processes == self.processes:
            raise RunError(
                f"the run's updates have {saved.accumulate} steps of {saved.batch_size} images, but would resume with "
                f"{self.accumulate} of {self.batch_size}, which changes results; resume with --data.batch_size "
                f"{saved.batch_size} --accumulate {saved.accumulate}"
            )
        return (
            f"warning: the run had {saved.processes} processes, now it has {self.processes}: updates use the same "
            "images, but results differ, because of rounding and because mixing, batch norm and dropout use other "
            "batches"
        )


@dataclass
class TrainingState:
    """Everything that the next update depends on, except random states: all randomness is keyed by the seed, the epoch
    or the update (see vim.data.randomness).

    model: unwrapped. metric: key of the record that ranks epochs. split: of the images of an update. data: see
    `record_data`. ema: None without EMA. scaler: None except for fp16. unsharded: a model of the same kind on the CPU;
    None if `model` is not sharded. update: number of updates made or skipped, over all epochs. so_far: the current
    epoch. history: one record per finished epoch, the lines of log.jsonl. bad_images: paths of unreadable files.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Scheduler
    metric: str
    split: UpdateSplit
    data: dict[str, Any]
    ema: ModelEmaV3 | None = None
    scaler: GradScaler | None = None
    unsharded: nn.Module | None = None
    update: int = 0
    so_far: EpochSoFar = field(default_factory=EpochSoFar)
    history: list[dict[str, Any]] = field(default_factory=list)
    bad_images: set[str] = field(default_factory=set)

    @property
    def total_batch(self) -> int:
        """Images per update."""
        return self.split.total_batch

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    def ranking(self) -> list[dict[str, Any]]:
        """The records of all epochs, best first; of equal ones the earlier first."""
        return sorted(self.history, key=self.score, reverse=True)

    def best(self) -> dict[str, Any]:
        return self.ranking()[0]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update; with layer decay, that of the top layer."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def score(self, record: dict[str, Any]) -> float:
        """The metric that ranks epochs: of the EMA weights if there are any, else of the weights."""
        return record.get(f"ema_{self.metric}", record[self.metric])

    def models(self) -> dict[str, nn.Module]:
        """The trained models, unsharded: "" for the weights and, if there is an EMA, "ema". All processes call this
        together."""
        models = {"": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})
        if self.unsharded is None:
            return models
        whole = {}
        for name, model in models.items():
            whole[name] = deepcopy(self.unsharded)
            whole[name].load_state_dict(gathered(model.state_dict()))
        return whole

    def end_update(self) -> None:
        """Update the EMA; set the learning rate of the next update."""
        self.update += 1
        if self.ema is not None:
            self.ema.update(self.model, self.update if self.ema.use_warmup else None)
        self.schedule.step_update(self.update)

    def count_update(self, loss: float, made: bool, lr: float, seconds: float) -> None:
        """Add an update to the statistics of the epoch.

        Args:
            loss: mean over its images.
            made: False if it was skipped.
            lr: its learning rate.
            seconds: its duration.
        """
        so_far = self.so_far
        so_far.images += self.total_batch
        so_far.lr = lr
        so_far.seconds += seconds
        if made:
            so_far.updates += 1
            so_far.loss += loss
            so_far.skipped_in_row = 0
        else:
            so_far.skipped += 1
            so_far.skipped_in_row += 1

    def end_epoch(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self.so_far = EpochSoFar(skipped_in_row=self.so_far.skipped_in_row)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, except that sharded tensors are this process's pieces."""
        # timm's loaders know the keys model and model_ema, and prefer the latter.
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        state = own_pieces(state)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        position = {"update": self.update, "so_far": asdict(self.so_far), "history": self.history}
        about = {"split": asdict(self.split), "data": self.data, "bad_images": sorted(self.bad_images)}
        return state | position | about

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Load a checkpoint.

        Returns: warnings.
        Raises: RunError if its data set, its updates or its model differ from this run's.
        """
        record = {"total_batch"} if "total_batch" in state else {"split", "data"}
        if missing := sorted((record | {"model", "optimizer", "update", "so_far", "history"}) - state.keys()):
            raise RunError(
                f"the checkpoint has no {', '.join(missing)}: it is damaged, or from an earlier version of this "
                "package; resume it with that version"
            )
        warning = self._check_same_run(state)
        try:
            self._load(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"the checkpoint does not fit the run: {' '.join(str(error).split())}") from error
        return [] if warning is None else [warning]

    def _check_same_run(self, state: dict[str, Any]) -> str | None:
        """Returns: a warning. Raises: RunError for other data or other updates."""
        if "total_batch" not in state:
            check_same_data(state["data"], self.data)
            return self.split.check(UpdateSplit(**state["split"]))
        # Checkpoints of the first version record the total batch, but neither its split nor the data.
        if state["total_batch"] != self.total_batch:
            self.split.check(UpdateSplit(state["total_batch"], 1, 1))
        return "warning: the checkpoint, of an earlier version, has no record of the data; make sure they are the same"

    def _load(self, state: dict[str, Any]) -> None:
        load_whole(self.model, state["model"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        optimizer = scatter_optimizer_state(state["optimizer"], parameters)
        for saved, own in zip(optimizer["param_groups"], self.optimizer.param_groups, strict=True):
            saved["fused"] = own.get("fused")  # fused kernels depend on this machine, not on the checkpoint
        self.optimizer.load_state_dict(optimizer)
        if self.ema is not None:
            load_whole(self.ema.module, state["model_ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.update, self.history = state["update"], list(state["history"])
        self.so_far = EpochSoFar(**state["so_far"])
        self.bad_images = set(state["bad_images"])
        self.schedule.step_update(self.update)
