"""What stops a run from outside: signals, failing or hanging workers, a second process, a launcher."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from image_tree import write_image_tree
from torch.utils.data import get_worker_info
from whole_runs import config, interrupt, one_thread  # noqa: F401  (the fixture)

from vim.checkpoint import load_checkpoint
from vim.console import InterruptedRunError, RunError
from vim.console.exits import end_children
from vim.console.interruption import SIGNALS, Interruption
from vim.data import DataConfig, TrainImages
from vim.timm_models.config import ModelConfig
from vim.training import train
from vim.training.averaging import EmaConfig
from vim.training.classification import Classification
from vim.training.run_lock import RunLock
from vim.training.state import TrainingState

os.environ["ACCELERATE_USE_CPU"] = "true"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def not_under_nohup():
    """The tests may have been started under nohup, which would make them ignore SIGHUP."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


DATA = {"batch_size": 16, "crop_pct": 1.0, "mean": (0.3,), "std": (0.2,)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("stops") / "images", {"train": 66, "val": 15}, classes=3)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The last checkpoint of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(config(tree, run_dir))
    return last(run_dir)


def last(run_dir):
    state = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    return {"update": state["update"], **state["model"]}


def with_workers(tree, run_dir, count=1, **changes):
    return config(tree, run_dir, data=DataConfig(str(tree), num_workers=count, **DATA), **changes)


def fail_in_worker(monkeypatch, how):
    """Let a worker call `how` before its seventh batch, the third of the second epoch. A result of `how` replaces the
    batch."""
    collate = TrainImages.collate

    def failing(self, samples):
        self.batches = getattr(self, "batches", 0) + 1
        instead = how() if self.batches == 7 and get_worker_info() is not None else None
        return collate(self, samples) if instead is None else instead

    monkeypatch.setattr(TrainImages, "collate", failing)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def raise_an_error():
    raise RuntimeError("no room\nat all")


def fill_shared_memory():
    """For new batches: those before lie there already, and another thread may still be handing them over."""
    share = torch.UntypedStorage._share_fd_cpu_

    def full(self, *args):
        if threading.current_thread() is not threading.main_thread():
            return share(self, *args)
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    torch.UntypedStorage._share_fd_cpu_ = full  # in the worker alone


def block():
    time.sleep(1000)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (die, "a data worker has failed: "),
        (raise_an_error, "has failed: no room at all;"),
        (fill_shared_memory, "cannot hand over a batch of 0.0 MiB: /dev/shm has .* No space left on device"),
        # Nothing pickles it: the thread that hands over would drop it. The batch before may be on its way still.
        (lambda: lambda: None, "exited unexpectedly|it ended while it handed over a batch"),
    ],
    ids=["died", "raised", "no shared memory", "lost"],
)
def test_a_failing_worker_stops_the_run_after_a_save(tree, whole, tmp_path, monkeypatch, how, what):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_worker(patch, how)
        with ends(RunError, rf"({what}).* All up to update [456] is saved; resume with: python") as failed:
            train(with_workers(tree, run_dir))
    assert "\n" not in str(failed.value)
    train(config(tree, run_dir), resume=True)
    assert_same(last(run_dir), whole)


def test_a_worker_that_fails_within_an_update_leaves_the_previous_update(tree, tmp_path, monkeypatch):
    """Batch norm must forget the images of a step whose update is never made."""
    after, end_update = [], TrainingState.end_update

    def noted(self):
        end_update(self)
        after.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(TrainingState, "end_update", noted)
    fail_in_worker(monkeypatch, raise_an_error)
    model = ModelConfig("test_resnet", kwargs={"in_chans": 1})
    data = DataConfig(str(tree), num_workers=1, **DATA | {"batch_size": 8})
    with ends(RunError, "All up to update 2 is saved"):
        train(config(tree, tmp_path, model=model, data=data, accumulate=2, ema=EmaConfig()))
    assert last(tmp_path)["bn1.num_batches_tracked"] == 2 * 2
    assert_same(last(tmp_path), {"update": 2, **after[1]})


@contextmanager
def ends(kind, match):
    """Expect an error, then end the workers as the tools do: torch would wait for hanging ones."""
    try:
        with pytest.raises(kind, match=match) as error:
            yield error
    finally:
        end_children()


def assert_same(state, whole):
    assert state.pop("update") == whole["update"]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_stops_a_run_whose_worker_hangs(tree, whole, tmp_path, monkeypatch, name):
    number, run_dir = signal.Signals[name], tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_worker(patch, block)
        update = Classification.batch_loss

        def signalled(self, batch):
            if self.state.update == 4:  # the dataloader is already waiting for the batch that never comes
                threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
            return update(self, batch)

        patch.setattr(Classification, "batch_loss", signalled)
        with ends(InterruptedRunError, f"stopped by {name}; resume with: python") as stopped:
            train(with_workers(tree, run_dir))
    assert stopped.value.exit_code == 128 + number
    assert last(run_dir)["update"] == 5
    train(config(tree, run_dir), resume=True)
    assert_same(last(run_dir), whole)


def in_a_process(code, *args, **options):
    """Run Python code in a new process, in a new process group."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, start_new_session=True, text=True, **options)


def test_a_second_signal_ends_what_hangs():
    """Even in C code, where no handler runs. A repetition of the first signal right after it does not count."""
    code = """
import hashlib
from vim.console.interruption import Interruption
with Interruption() as interruption, interruption.postponed():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour
"""
    process = in_a_process(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    while process.poll() is None:
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 143
    assert process.stderr.read().count("\n") == 1


def test_a_postponed_signal_is_raised_at_the_end_of_the_block():
    """Except in `admitted` parts. Afterwards the former handlers are back."""
    former, reached = [signal.getsignal(number) for number in SIGNALS], []

    def go(interruption, admit):
        with interruption.postponed():
            with interruption.admitted():
                reached.append("not asked")
            with interruption.admitted() if admit else nullcontext():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("asked")
            reached.append("end")

    for admit in (False, True):
        with Interruption() as interruption:
            with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
                go(interruption, admit)
            with pytest.raises(InterruptedRunError), interruption.postponed(), interruption.admitted():
                reached.append("asked before")
        assert [signal.getsignal(number) for number in SIGNALS] == former
    assert reached == ["not asked", "asked", "end", "not asked"]


def test_the_first_signal_says_how_a_run_ended(monkeypatch):
    monkeypatch.setattr("vim.console.interruption.SECONDS_OF_AN_ECHO", 1000.0)  # even if this process is slow

    def go(interruption):
        with interruption.postponed():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with Interruption() as interruption:
        with pytest.raises(InterruptedRunError, match="stopped by SIGTERM") as stopped:
            go(interruption)
        os.kill(os.getpid(), signal.SIGINT)  # a later signal must not interrupt the handling of the first
    assert stopped.value.number == signal.SIGTERM


def test_a_forked_child_leaves_signals_to_its_parent():
    """A scheduler signals all processes; here the parent handles it."""
    with Interruption() as interruption:
        child = os.fork()
        if child == 0:
            with suppress(InterruptedRunError):
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0 if interruption.asked is None else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert interruption.asked is None


def test_the_former_wakeup_descriptor_is_restored():
    """The number of a closed descriptor may be reused, for example by a checkpoint file."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer)
    try:
        with Interruption():
            pass
        assert signal.set_wakeup_fd(former) == writer
    finally:
        signal.set_wakeup_fd(former)
        os.close(reader)
        os.close(writer)


def test_a_run_in_a_thread_leaves_signals_alone():
    former, inside = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Interruption():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [former]


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """The previous owner may remove the file after another process opened it and before it locks it."""
    lockf = fcntl.lockf

    def late(*args):
        lockf(*args)
        monkeypatch.setattr(fcntl, "lockf", lockf)
        (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "lockf", late)
    lock = RunLock(tmp_path)
    assert lock.acquire() is None
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    warning = rf"warning: {tmp_path} cannot be locked \(No locks available\); do not start a second run in it"
    assert re.fullmatch(warning, RunLock(tmp_path).acquire())


def test_nohup_keeps_its_meaning():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.asked is None
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_run_in_the_background_of_a_script_can_be_stopped():
    """The shell makes it ignore SIGINT."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(InterruptedRunError, match="stopped by SIGINT"), Interruption():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_two_processes_do_not_train_in_one_folder(tree, whole, tmp_path, monkeypatch):
    """The lock ends with its process, even after SIGKILL and with a worker still alive."""
    run_dir = tmp_path / "run"
    interrupt(monkeypatch, Classification, 1)
    with pytest.raises(InterruptedRunError):
        train(config(tree, run_dir))
    monkeypatch.undo()
    assert not (run_dir / ".lock").exists()
    code = """
import os, sys, time
from pathlib import Path
from vim.training.run_folder import RunFolder
RunFolder(sys.argv[1], "").lock.acquire()
if os.fork() == 0:
    time.sleep(1000)
print("locked", flush=True)
time.sleep(1000)
"""
    process = in_a_process(code, run_dir, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=rf"process {process.pid} on .* is training in {run_dir}; wait until"):
            train(config(tree, run_dir), resume=True)
        process.kill()
        process.wait()
        train(config(tree, run_dir), resume=True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert_same(last(run_dir), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of a parent's death")
def test_a_dying_launcher_sends_a_signal(tmp_path):
    """After SIGKILL to a parent with the name of accelerate's launcher; another parent has no effect."""
    child = """
import os, signal, sys
from vim.training.launcher import end_with_the_launcher
caught, parent = [], os.getppid()
signal.signal(signal.SIGTERM, lambda *_: caught.append("SIGTERM"))
end_with_the_launcher()
print(os.getpid(), flush=True)
while os.getppid() == parent and not caught:
    signal.sigtimedwait([signal.SIGUSR1], 0.1)
signal.sigtimedwait([signal.SIGUSR1], 1)
print(*caught or ["nothing"], flush=True)
"""
    launch = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    for name, want in (("accelerate", "SIGTERM"), ("wrapper", "nothing")):
        (tmp_path / name).write_text(launch)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, tmp_path / name, child]
        parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        assert parent.stdout.readline() == f"{want}\n"
