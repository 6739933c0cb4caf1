"""Backend `cpu` as a program: how it is compiled, cached and loaded, and how it runs on threads."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from scan_inputs import pair_inputs

from vim_kernels import available_backends, bidirectional_selective_scan, cpu

CC = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = pytest.mark.skipif(CC is None, reason="needs a C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a library that is loaded anew from it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VIM_KERNELS_CACHE", str(folder))
    monkeypatch.setenv("CC", CC)
    cpu.library.cache_clear()
    yield folder
    cpu.library.cache_clear()


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Make $CC a shell script; `real` in it is the machine's compiler."""

    def install(script: str) -> None:
        path = tmp_path / "fake-cc"
        path.write_text(f'#!/bin/sh\nreal() {{ "{CC}" "$@"; }}\n{textwrap.dedent(script)}')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))

    return install


def load_anew() -> str | None:
    cpu.library.cache_clear()
    return cpu.load_error()


def run_python(code: str, **environment: str) -> tuple[str, str]:
    """What a new Python process prints and logs."""
    code = "import logging; logging.basicConfig(level=logging.INFO)\n" + textwrap.dedent(code)
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_compiles_once(cache, caplog):
    with caplog.at_level("INFO", "vim_kernels"):
        assert load_anew() is None
        (built,) = cache.iterdir()
        time = built.stat().st_mtime_ns
        assert load_anew() is None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [time]
    assert len(caplog.records) == 1
    assert "compiled the CPU kernels" in caplog.text


def test_each_compiler_and_precision_has_a_library_of_its_own(cache, monkeypatch):
    assert load_anew() is None
    assert cpu.library(torch.float64) is not cpu.library(torch.float32)
    monkeypatch.setenv("CC", f"{CC} -DSOMETHING_ELSE")
    assert load_anew() is None
    assert len(list(cache.iterdir())) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_first_use_by_many_processes(cache):
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(0 if load_anew() is None else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_damaged_library_is_compiled_again(cache, tmp_path, monkeypatch):
    assert load_anew() is None
    (built,) = cache.iterdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / built.name).write_bytes(b"not a library")
    monkeypatch.setenv("VIM_KERNELS_CACHE", str(other))
    assert load_anew() is None
    assert (other / built.name).stat().st_size == built.stat().st_size


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert load_anew() is None
    assert "the cache does not work" in caplog.text


def test_no_folder_at_all(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert "no folder to keep the compiled CPU kernels" in load_anew()


def test_a_compiler_without_march_native(cache, fake_compiler):
    fake_compiler("""
        case "$*" in *-march=native*) echo "unknown option" >&2; exit 1;; esac
        real "$@"
    """)
    assert load_anew() is None


def test_a_compiler_that_fails(cache, fake_compiler):
    fake_compiler("echo out of licences >&2; exit 1")
    assert "out of licences" in load_anew()
    assert not cache.exists()


def test_a_compiler_that_dies_half_way(cache, fake_compiler):
    """The probe works, the compilation writes part of a file and stops."""
    fake_compiler("""
        case "$*" in *-dM*) real "$@"; exit;; esac
        while [ $# -gt 1 ]; do [ "$1" = -o ] && echo half > "$2"; shift; done
        echo killed >&2; exit 1
    """)
    assert "killed" in load_anew()
    assert list(cache.iterdir()) == []


def test_no_compiler(cache, tmp_path):
    """Backend "auto" takes `torch` and says so once; the backend asked for by name raises."""
    code = """
        import torch, vim_kernels
        u = torch.ones(1, 3, 2)
        arguments = u, u, -torch.ones(2, 1), u[..., :1], u[..., :1]
        print(vim_kernels.available_backends())
        for _ in range(2):
            print(vim_kernels.selective_scan(*arguments).shape)
        try:
            vim_kernels.selective_scan(*arguments, backend="cpu")
        except RuntimeError as error:
            print(error)
    """
    (tmp_path / "bin").mkdir()
    out, log = run_python(code, CC="", PATH=str(tmp_path / "bin"))
    assert "'cpu'" not in out.splitlines()[0]
    assert "torch.Size([1, 3, 2])" in out
    assert "backend 'cpu' cannot run here: there is no C compiler: cc or gcc or clang is not on PATH" in out
    assert log.count("backend 'torch' for tensors on cpu: the faster 'cpu' cannot run here: there is no C") == 1


def test_no_compiler_by_that_name(cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert "no-such-compiler is not on PATH" in load_anew()


def scan_and_gradients(**shape) -> list[torch.Tensor]:
    inputs = pair_inputs(**shape, dtype=torch.float32)
    leaves = [t for value in inputs.values() for t in (value if isinstance(value, tuple) else (value,))]
    y = bidirectional_selective_scan(**inputs, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs the cpu backend")
@pytest.mark.parametrize(
    "shape", [{"batch": 9}, {"batch": 1, "d_inner": 600}, {"batch": 2, "d_inner": 400, "groups": 2}]
)
def test_any_number_of_threads_gives_the_same_bits(shape):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(scan_and_gradients(length=300, **shape))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_after_a_fork():
    """The OpenMP threads of the parent are gone in the child, where asking for them would wait for ever."""
    code = """
        import os, signal, torch, vim_kernels
        torch.set_num_threads(2)
        u = torch.ones(4, 200, 64)
        arguments = u, u, -torch.ones(64, 16), u[..., :16], u[..., :16]
        want = vim_kernels.selective_scan(*arguments, backend="cpu")
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            same = vim_kernels.selective_scan(*arguments, backend="cpu").numpy().tobytes() == want.numpy().tobytes()
            os._exit(0 if same else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert run_python(code)[0].strip() == "0"
