"""How a tool ends: an error in one line, an exit code, no workers left."""

import multiprocessing
import signal
import time

import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from vim.console import InterruptedRunError, RunError, plain_errors
from vim.data import DataError
from vim.data.loaders import loader


def test_a_worker_that_has_only_just_started_is_no_error(capsys):
    """The signal kills it; workers that have set their handlers end by themselves."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    signal_handling._set_SIGCHLD_handler()
    signal_handling._set_worker_pids(1, (process.pid,))
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(SystemExit), plain_errors():
            raise RunError("the disk is full")
    finally:
        signal_handling._remove_worker_pids(1)
    assert process.exitcode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert capsys.readouterr().err == "error: the disk is full\n"


class Unreadable:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("cannot read image x.png: it is empty")


def test_an_error_of_a_worker_prints_without_its_traceback(capsys):
    with pytest.raises(SystemExit), plain_errors():
        next(iter(DataLoader(Unreadable(), num_workers=1)))
    assert capsys.readouterr().err == "error: cannot read image x.png: it is empty\n"


@pytest.mark.parametrize(
    ("error", "code"), [(RunError("no"), 1), (InterruptedRunError("no"), 130), (InterruptedRunError("no", 15), 143)]
)
def test_the_exit_code_tells_of_a_signal(error, code):
    with pytest.raises(SystemExit) as exit_, plain_errors():
        raise error
    assert exit_.value.code == code


def test_an_error_leaves_no_workers(capsys):
    """A program with a GPU would wait for them at its end."""
    batches = loader(range(8), 2, num_workers=2)
    before = set(multiprocessing.active_children())
    first = next(iter(batches))
    workers = set(multiprocessing.active_children()) - before
    assert len(first) == len(workers) == 2
    with pytest.raises(SystemExit), plain_errors():
        raise RunError("the disk is full")
    for worker in workers:
        worker.join()
    assert capsys.readouterr().err == "error: the disk is full\n"
