"""What the tests of whole training runs share."""

import os
import signal

import pytest
import torch

from vim.training.kill_test import TIME_FIELDS


@pytest.fixture(scope="module")
def one_thread():
    """A second thread does not help tensors of this size, and costs milliseconds an operator where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timeless(history):
    return [{key: value for key, value in record.items() if key not in TIME_FIELDS} for record in history]


def interrupt(monkeypatch, task, update, number=signal.SIGINT):
    """Send a signal to a run of a task, a subclass of Trainer, while it does an update, counted from 0."""
    batch_loss = task.batch_loss

    def interrupted(self, batch):
        if self.state.update == update:
            os.kill(os.getpid(), number)
        return batch_loss(self, batch)

    monkeypatch.setattr(task, "batch_loss", interrupted)
