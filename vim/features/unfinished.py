"""Save and resume a linear probe."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vim.checkpoint import load_checkpoint, save_checkpoint
from vim.console.errors import RunError
from vim.console.interruption import Interruption

from .judge import accuracy, linear_probe

SECONDS_BETWEEN_SAVES = 60


class UnfinishedProbe:
    """Trains sets of linear classifiers, and skips those that a stopped probe had finished.

    It saves its state once a minute and after a signal.

    Args:
        path: of the saved state. A damaged file is ignored with a warning.
        identity: all that the results depend on, including epochs.
        interruption: an entered context.
        warn: receives the warning.

    Raises: RunError if the file has another identity.
    """

    def __init__(self, path: Path, identity: dict[str, Any], interruption: Interruption, warn: Callable[[str], None]):
        self.path, self.identity, self.interruption = path, identity, interruption
        self.done: list[list[dict[str, Any]]] = []  # results of the finished `train` calls, in order
        self.current: dict[str, Any] | None = None  # state of the unfinished one
        self._trained = 0
        self._saved_at = time.monotonic()
        if not path.exists():
            return
        try:
            saved = load_checkpoint(path)
        except RunError as error:
            warn(f"warning: {error}\nstarting over")
            return
        if changed := [key for key in identity if saved["identity"].get(key) != identity[key]]:
            raise RunError(
                f"{path} is of an unfinished probe with another {', another '.join(changed)}; choose another --output, "
                "or remove it"
            )
        self.done, self.current = saved["done"], saved["at_hand"]

    @property
    def epochs_done(self) -> int:
        current = 0 if self.current is None else self.current["epoch"]
        return len(self.done) * self.identity["epochs"] + current

    def train(
        self,
        train: dict[str, Tensor],
        train_labels: Tensor,
        held_out: dict[str, Tensor],
        held_out_labels: Tensor,
        classes: int,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Run `linear_probe` with these options.

        Returns: a row for each input and learning rate: inputs, lr, and top1 and top5 of the held-out images in
            percent, None if the classifier diverged.
        Raises: InterruptedRunError after a signal, once the state is saved.
        """
        self._trained += 1
        if self._trained > len(self.done):
            saved, self.current = self.current, None
            with self.interruption.postponed():
                logits = linear_probe(
                    train, train_labels, held_out, classes, saved=saved, after_update=self._after_update, **options
                )
                labels = held_out_labels.cpu()
                self.done.append(
                    [{**asdict(probe), **_figures(found.cpu(), labels)} for probe, found in logits.items()]
                )
                self._after_update(lambda: None)
        return self.done[self._trained - 1]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _after_update(self, state: Callable[[], dict[str, Any] | None]) -> None:
        if self.interruption.asked is None and time.monotonic() - self._saved_at < SECONDS_BETWEEN_SAVES:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint({"identity": self.identity, "done": self.done, "at_hand": state()}, self.path)
        self._saved_at = time.monotonic()
        self.interruption.obey()


def _figures(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    return accuracy(logits, labels) if logits.isfinite().all() else {"top1": None, "top5": None}
