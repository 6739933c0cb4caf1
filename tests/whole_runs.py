"""What the tests of whole training runs share."""

import pytest
import torch

from vim.training import trainer

TIMES = {"seconds", "images_per_second"}


@pytest.fixture(scope="module")
def one_thread():
    """A second thread does not help tensors of this size, and costs milliseconds an operator where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timeless(history):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


def interrupt(monkeypatch, epochs_before):
    """Make a run stop as by Ctrl-C when it has done so many epochs."""
    train_epoch = trainer.Trainer.train_epoch

    def interrupted(self):
        if self.state.epoch == epochs_before:
            raise KeyboardInterrupt
        return train_epoch(self)

    monkeypatch.setattr(trainer.Trainer, "train_epoch", interrupted)
