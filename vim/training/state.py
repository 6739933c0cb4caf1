"""What a run knows at the end of an epoch, and a checkpoint holds."""

from dataclasses import dataclass, field
from typing import Any

from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer


@dataclass
class TrainingState:
    """Everything that the next epoch depends on. Random generators are not in it: all randomness is keyed by the
    seed, the epoch or the update (see vim.data.randomness).

    model: unwrapped. metric: key of a record that makes an epoch the best. ema: None without averaging. scaler: None
    but under fp16. update: updates done. history: a record for each epoch done, the lines of log.jsonl.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Scheduler
    metric: str
    ema: ModelEmaV3 | None = None
    scaler: GradScaler | None = None
    update: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def best(self) -> dict[str, Any]:
        """The record of the best epoch, the earliest of equals."""
        return max(self.history, key=self.score)

    @property
    def learning_rate(self) -> float:
        """Of the next update; with layer decay, of the top layer."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def score(self, record: dict[str, Any]) -> float:
        """The metric, of the averaged weights where there are any."""
        return record.get(f"ema_{self.metric}", record[self.metric])

    def models(self) -> dict[str, nn.Module]:
        """The trained model under the name "", and that of the averaged weights under "ema" where there is one."""
        return {"": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def end_update(self) -> None:
        """Count an update; average its weights; set the learning rate of the next."""
        self.update += 1
        if self.ema is not None:
            self.ema.update(self.model)
        self.schedule.step_update(self.update)

    def state_dict(self) -> dict[str, Any]:
        # timm's loaders know the names model and model_ema, and prefer the latter.
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state | {"update": self.update, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.update, self.history = state["update"], list(state["history"])
        self.schedule.step_update(self.update)
