"""Two processes on the CPU train like one: with DDP and FSDP, stopped, and resumed on one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_tree import write_image_tree
from processes import outputs
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from vim.checkpoint import Piece, duplicate, load_checkpoint, save_checkpoint, save_shard
from vim.console import RunError, plain_errors
from vim.data import AugmentConfig, DataConfig
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model
from vim.training import TrainConfig, classification, train
from vim.training.averaging import EmaConfig
from vim.training.classification import Classification
from vim.training.graphs import average_gradients
from vim.training.optim import OptimConfig, ScheduleConfig
from vim.training.run_folder import RunFolder

MODEL = ModelConfig("vim_nano", kwargs={"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 2})


def config(root, name, batch_size, fsdp=False, accumulate=2):
    """Updates of 16 images; no randomness that depends on the number of processes."""
    return TrainConfig(
        run_dir=str(Path(root) / "runs" / name),
        accumulate=accumulate,
        fsdp=fsdp,
        model=MODEL,
        data=DataConfig(str(Path(root) / "images"), batch_size=batch_size, crop_pct=1.0, mean=(0.3,), std=(0.2,)),
        augment=AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0.0, affine_degrees=5.0),
        optim=OptimConfig(name="sgd", lr=0.05, clip_grad=1.0, layer_decay=0.9, kwargs={"momentum": 0.9}),
        schedule=ScheduleConfig(epochs=2, warmup_epochs=0),
        ema=EmaConfig(0.8, warmup=True),
    )


def run(root, name, batch_size, fsdp=False, resume=False, accumulate=2, stop=None):
    """Code of one process. stop: the update in which this process gets a SIGTERM, or "evaluation"."""
    if accumulate == 1 and os.environ["ACCELERATE_USE_CPU"] == "true":  # as captured, without the graph
        classification.wants_cuda_graph = lambda *_: True
        classification.capture_training = lambda *_: None
        torch.cuda.graph_pool_handle = lambda: None
    batch_loss, evaluate_model = Classification.batch_loss, Classification.evaluate_model

    def stopped(self, batch):
        divided = fsdp and self.accelerator.num_processes > 1
        assert isinstance(next(self.state.model.parameters()), DTensor) == divided
        if self.state.update == stop:
            os.kill(os.getpid(), 15)
        return batch_loss(self, batch)

    def stopped_later(self, *args):
        if stop == "evaluation":
            os.kill(os.getpid(), 15)
        return evaluate_model(self, *args)

    Classification.batch_loss, Classification.evaluate_model = stopped, stopped_later
    with plain_errors():
        train(config(root, name, batch_size, fsdp, accumulate), resume=resume)


def start(processes, *args, stop=(None, None), cpu=True):
    """Start processes that call `run`, on the CPU or on one GPU each. stop: one value per process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | group if processes > 1 else {}
        common = {
            "ACCELERATE_USE_CPU": str(cpu).lower(),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        env = os.environ | own | common
        code = f"import vim, test_training_distributed as t; t.run(*{args!r}, stop={stop[rank]!r})"
        started.append(subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE))
    return started


def codes(processes):
    errors = [error.decode() for _, error in outputs(*processes)]
    return [process.returncode for process in processes], errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with images and a run of one process."""
    return run_alone(tmp_path_factory, cpu=True)


def run_alone(tmp_path_factory, cpu):
    root = tmp_path_factory.mktemp("two")
    write_image_tree(root / "images", {"train": 66, "val": 9}, classes=3)
    ended, errors = codes(start(1, str(root), "alone", 8, cpu=cpu))
    assert ended == [0], errors
    return root


@pytest.fixture(scope="module")
def alone_on_a_gpu(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return run_alone(tmp_path_factory, cpu=False)


def assert_same_run(root, name):
    one, two = (root / "runs" / folder for folder in ("alone", name))
    records = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (one, two)]
    for a, b in zip(*records, strict=True):
        assert (a["updates"], a["lr"]) == (b["updates"], b["lr"])
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-5
    assert json.loads((two / "summary.json").read_text())["val_images"] == 9
    for folder in ("", "ema"):
        weights, others = (load_file(path / folder / "model.safetensors") for path in (one, two))
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            assert_close(others[key], weight, atol=1e-5, rtol=1e-4)
    states = [load_checkpoint(path / "checkpoints" / "last.pt") for path in (one, two)]
    for number, entries in states[0]["optimizer"]["state"].items():
        momentum = entries["momentum_buffer"]
        assert_close(states[1]["optimizer"]["state"][number]["momentum_buffer"], momentum, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_stopped_and_resumed_on_one_equal_one_alone(alone, fsdp):
    """A signal to one process stops both, in the middle of an epoch."""
    name = f"fsdp-{fsdp}"
    ended, errors = codes(start(2, str(alone), name, 4, fsdp, stop=(None, 5)))
    assert ended == [143, 143], errors
    last = alone / "runs" / name / "checkpoints" / "last.pt"
    assert load_checkpoint(last)["update"] == 6
    if fsdp:
        assert sorted(path.name for path in last.iterdir()) == ["shard-0-of-2.pt", "shard-1-of-2.pt"]
    ended, errors = codes(start(1, str(alone), name, 4, fsdp, True))  # half the total batch
    assert ended == [1]
    assert "the run has 16 images per update, but would resume with 8" in errors[0]
    assert codes(start(1, str(alone), name, 8, fsdp, True)) == ([0], [""])
    assert_same_run(alone, name)


def test_two_processes_that_capture_equal_one_alone(alone):
    """They all-reduce their gradients themselves, without DistributedDataParallel."""
    assert codes(start(2, str(alone), "captured", 8, False, False, 1)) == ([0, 0], ["", ""])
    assert_same_run(alone, "captured")


def average(rank, address):
    """Code of one process of the test below."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "norm": torch.nn.BatchNorm1d(2)})
    model["unused"], model["frozen"] = torch.nn.Linear(1, 2), torch.nn.Linear(1, 1).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (rank == 0 or "unused" not in name):
            parameter.grad = torch.arange(float(parameter.numel())).view_as(parameter) + 10 * rank
    model["norm"].running_mean += rank + 1
    average_gradients(model)
    for name, parameter in model.named_parameters():
        numbers = torch.arange(float(parameter.numel())).view_as(parameter)
        if "frozen" in name:
            assert parameter.grad is None
        else:
            assert_close(parameter.grad, numbers / 2 if "unused" in name else numbers + 5, atol=0, rtol=0)
    assert model["norm"].running_mean.tolist() == [1, 1]


def test_averaging_of_gradients():
    """A missing gradient counts as zero; buffers come from the first process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    torch.multiprocessing.start_processes(average, (address,), nprocs=2, start_method="spawn")


def test_a_signal_during_evaluation_stops_both(alone):
    """Both stop at the same batch: one alone would leave the other waiting."""
    ended, errors = codes(start(2, str(alone), "evaluating", 4, stop=(None, "evaluation")))
    assert ended == [143, 143], errors
    saved = load_checkpoint(alone / "runs" / "evaluating" / "checkpoints" / "last.pt")
    assert (saved["update"], saved["history"]) == (4, [])
    assert codes(start(2, str(alone), "evaluating", 4, False, True)) == ([0, 0], ["", ""])
    assert_same_run(alone, "evaluating")


def test_two_processes_with_shards_equal_one_alone(alone):
    """A run started by one process resumes with two."""
    assert codes(start(1, str(alone), "grown", 8, True, stop=(5,)))[0] == [143]
    ended, errors = codes(start(2, str(alone), "grown", 4, True, True))
    assert ended == [0, 0], errors
    assert_same_run(alone, "grown")

    best = alone / "runs" / "grown" / "checkpoints" / "best.pt"
    loaded = create_model(ModelConfig(MODEL.name, checkpoint=str(best), kwargs=MODEL.kwargs), num_classes=3)
    averaged = load_checkpoint(best)["model_ema"]
    assert_close(loaded.state_dict(), averaged, atol=0, rtol=0)
    assert "state_dict" not in loaded.pretrained_cfg


@pytest.mark.gpu
@pytest.mark.parametrize(("fsdp", "accumulate"), [(True, 2), (False, 1), (False, 2)])  # 1: with a CUDA graph
def test_two_gpus_stopped_and_resumed_on_one_equal_one_alone(alone_on_a_gpu, fsdp, accumulate):
    root, name = alone_on_a_gpu, f"{fsdp}-{accumulate}"
    ended, errors = codes(
        start(2, str(root), name, 8 // accumulate, fsdp, False, accumulate, stop=(None, 5), cpu=False)
    )
    assert ended == [143, 143], errors
    ended, errors = codes(start(1, str(root), name, 16 // accumulate, fsdp, True, accumulate, cpu=False))
    assert ended == [0], errors
    assert_same_run(root, name)


def test_a_damaged_shard_is_found(tmp_path):
    """A checkpoint with a missing shard, or with a shard of another one, is not loaded."""
    run = RunFolder(tmp_path, "tools/train.py")
    whole = {"update": 3, "steps": [torch.arange(5.0), 7]}

    def write(path, update):
        path.mkdir(parents=True)
        for process, rows in enumerate((3, 2)):  # as FSDP shards them
            piece = Piece(whole["steps"][0][3 * process :][:rows], (5,))
            save_shard({"update": update, "steps": [piece, 7]}, path, process, 2)

    write(run.new, 2)
    run.keep_new()
    write(run.new, 3)
    run.keep_new(run.best)
    assert_close(load_checkpoint(run.last), whole)
    assert_close(load_checkpoint(run.best), whole)
    save_checkpoint(whole, tmp_path / "one.pt")  # a file replaces a folder if one process resumes
    duplicate(tmp_path / "one.pt", run.best)
    assert run.best.is_file()
    duplicate(run.last, run.best)
    assert_close(load_checkpoint(run.best), whole)
    warnings = []
    (run.last / "shard-1-of-2.pt").unlink()
    assert run.load(warnings.append)["update"] == 2
    assert "no checkpoint" in warnings[0]
    assert "shard-1-of-2.pt" in warnings[0]
    shutil.copyfile(run.last / "shard-0-of-2.pt", run.last / "shard-1-of-2.pt")
    with pytest.raises(RunError, match="shards do not belong together"):
        load_checkpoint(run.last)
