"""The library of backend `cpu`: compilation, cache, loading and threads."""

import errno
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from block_inputs import block_inputs, by_operators, weights_to
from scan_inputs import pair_inputs, scan_inputs
from ssd_inputs import inputs as ssd_inputs
from ssd_inputs import recurrence

from vim_kernels import (
    available_backends,
    bidirectional_selective_scan,
    bimamba_block,
    causal_conv1d,
    cpu,
    selective_scan,
    ssd,
)

CC = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = pytest.mark.skipif(CC is None, reason="needs a C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, a library loaded from it again, and a compiler without optimisation."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VIM_KERNELS_CACHE", str(folder))
    script = tmp_path / "quick-cc"
    script.write_text(f'#!/bin/sh\nexec "{CC}" "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    cpu.library.cache_clear()
    yield folder
    cpu.library.cache_clear()


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Make $CC a shell script; `real` in it is the machine's compiler."""

    def install(script: str) -> None:
        path = tmp_path / "fake-cc"
        path.write_text(f'#!/bin/sh\nreal() {{ "{CC}" "$@" -O0; }}\n{textwrap.dedent(script)}')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))

    return install


# Makes an empty library quickly; the compiler's macros are those of $MACHINE.
STUB = """
    case "$*" in *-dM*) echo "#define $MACHINE"; exit;; esac
    while [ $# -gt 1 ]; do [ "$1" = -o ] && out="$2"; shift; done
    echo "int here;" | real -shared -fPIC -x c - -o "$out"
"""


def load_anew() -> str | None:
    cpu.library.cache_clear()
    return cpu.load_error()


def run_python(code: str, cwd: Path | None = None, **environment: str) -> tuple[str, str]:
    """The output and log of a new Python process."""
    code = "import logging; logging.basicConfig(level=logging.INFO)\n" + textwrap.dedent(code)
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
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
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DSOMETHING_ELSE")
    assert load_anew() is None
    assert len(list(cache.iterdir())) == 3


def test_each_machine_and_each_source_has_a_library_of_its_own(cache, fake_compiler, tmp_path, monkeypatch):
    """Machines may share a home and a compiler name; a new package version finds the cache of the old one."""
    fake_compiler(STUB)
    sources = shutil.copytree(cpu._SOURCES, tmp_path / "sources")
    monkeypatch.setattr(cpu, "_SOURCES", sources)

    def names() -> set[str]:
        assert load_anew() is None
        return {path.name for path in cache.iterdir()}

    monkeypatch.setenv("MACHINE", "old")
    before = names()
    assert names() == before
    monkeypatch.setenv("MACHINE", "new")
    assert len(names() - before) == 1
    for path in sources.iterdir():
        before = names()
        path.write_bytes(path.read_bytes() + b"// changed\n")
        assert len(names() - before) == 1, path.name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_first_use_by_many_processes(cache, fake_compiler, tmp_path):
    """One compiles, the others wait for it."""
    fake_compiler(f"""
        case "$*" in *-dM*) ;; *) echo compiled >> {tmp_path}/log;; esac
        real "$@"
    """)
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(0 if load_anew() is None else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert (tmp_path / "log").read_text() == "compiled\n"


SCAN = """
    import torch, vim_kernels
    u = torch.ones(1, 3, 2)
    y = vim_kernels.selective_scan(u, u, -torch.ones(2, 1), u[..., :1], u[..., :1], backend="cpu")
    assert y.isfinite().all()
"""


@pytest.mark.parametrize("fault", ["short", "one bit"])
def test_a_damaged_library_is_compiled_again(cache, fault):
    """A truncated one would kill the process; one with a flipped bit could compute anything."""
    assert load_anew() is None
    (built,) = cache.iterdir()
    whole = built.read_bytes()
    half = len(whole) // 2
    rest = b"" if fault == "short" else bytes([whole[half] ^ 1]) + whole[half + 1 :]
    built.unlink()  # this process has the intact file mapped: cut short in place, it would kill it at exit
    built.write_bytes(whole[:half] + rest)
    _, log = run_python(SCAN)
    assert "is damaged: its checksum is not the one in its name" in log
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


def disown(path: Path, monkeypatch) -> None:
    """Make a file or folder belong to another user."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    elif path.is_dir():
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        pytest.skip("only root gives a file away")


@pytest.mark.parametrize("fault", [0o777, 0o770, "owner"])
@pytest.mark.parametrize("of", ["folder", "library"])
def test_what_others_can_write_is_not_loaded(cache, monkeypatch, caplog, fault, of):
    assert load_anew() is None
    (built,) = cache.iterdir()
    path = cache if of == "folder" else built
    disown(path, monkeypatch) if fault == "owner" else path.chmod(fault)
    with caplog.at_level("INFO", "vim_kernels"):
        assert load_anew() is None
    assert f"{path} {'belongs to another user' if fault == 'owner' else 'can be written by other users'}" in caplog.text
    assert "compiled the CPU kernels" in caplog.text
    if of == "folder":
        assert "set VIM_KERNELS_CACHE to a folder of your own" in caplog.text


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root makes files of root")
def test_what_root_made_is_loaded(cache, fake_compiler, monkeypatch, caplog):
    """An administrator may compile it for all users."""
    fake_compiler(STUB)
    assert load_anew() is None
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with caplog.at_level("INFO", "vim_kernels"):
        assert load_anew() is None
    assert not caplog.text


def test_a_whole_library_that_does_not_load_stays(cache, fake_compiler):
    """It comes from a machine with another C library that shares the cache."""
    fake_compiler(STUB)
    assert load_anew() is None
    (built,) = cache.iterdir()
    other = b"of another system"
    foreign = cache / f"{built.name.rpartition('-')[0]}-{hashlib.sha256(other).hexdigest()[:32]}.so"
    foreign.write_bytes(other)
    built.unlink()
    assert load_anew() is None
    assert set(cache.iterdir()) == {built, foreign}


def test_an_open_umask(cache, caplog):
    """The user's library is loaded again, even if the umask lets others write new files."""
    before = os.umask(0)
    try:
        assert load_anew() is None
    finally:
        os.umask(before)
    with caplog.at_level("INFO", "vim_kernels"):
        assert load_anew() is None
    assert not caplog.text


def test_what_a_killed_compiler_leaves_is_removed(cache, fake_compiler):
    """The compiler kills the process that waits for it, as a scheduler may."""
    fake_compiler("""
        case "$*" in *-dM*) real "$@"; exit;; esac
        while [ $# -gt 1 ]; do [ "$1" = -o ] && echo half > "$2"; shift; done
        kill -9 $PPID
    """)
    code = "from vim_kernels import cpu; cpu.load_error()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert [path.name[:6] for path in cache.iterdir()] == ["build-"]
    fake_compiler('real "$@"')
    assert load_anew() is None
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_disk_without_locks(cache, fake_compiler, monkeypatch, caplog):
    """The cache works, and a folder that may be another process's compilation stays."""
    fake_compiler(STUB)

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    other = cache / "build-of-another"
    cache.mkdir(mode=0o700)
    other.mkdir()
    assert load_anew() is None
    assert not caplog.text
    assert other.is_dir()
    assert [path.suffix for path in cache.iterdir() if path != other] == [".so"]


def test_a_full_disk(cache, fake_compiler, caplog):
    fake_compiler("""
        case "$*" in *"$VIM_KERNELS_CACHE"/*) echo "ld: No space left on device" >&2; exit 1;; esac
        real "$@"
    """)
    assert load_anew() is None
    assert "the cache does not work: the C compiler fails" in caplog.text
    assert "No space left on device" in caplog.text
    assert list(cache.iterdir()) == []


def test_a_relative_cache_stays_where_the_process_began(cache, tmp_path):
    for name in ("start", "elsewhere"):
        (tmp_path / name).mkdir()
    code = f"""
        import os, vim_kernels
        os.chdir({str(tmp_path / "elsewhere")!r})
        vim_kernels.available_backends()
    """
    run_python(code, cwd=tmp_path / "start", VIM_KERNELS_CACHE="kept")
    assert [path.suffix for path in (tmp_path / "start" / "kept").iterdir()] == [".so"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_user_cache(cache, fake_compiler, tmp_path, monkeypatch):
    """~ is the home directory; the standard says to ignore a relative XDG_CACHE_HOME."""
    fake_compiler(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VIM_KERNELS_CACHE", "~/own")
    assert load_anew() is None
    assert len(list((tmp_path / "own").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load_anew() is None
    assert not (tmp_path / "xdg").exists()
    monkeypatch.delenv("VIM_KERNELS_CACHE")
    assert load_anew() is None
    assert [path.suffix for path in (tmp_path / "xdg" / "vim_kernels").iterdir()] == [".so"]
    assert len(list((tmp_path / "own").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert load_anew() is None
    (folder,) = (
        tmp_path / folder / "vim_kernels" for folder in (".cache", "Library/Caches") if (tmp_path / folder).exists()
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (tmp_path / "relative").exists()


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


def test_a_compiler_that_fails_gives_way_to_the_next(cache, tmp_path, monkeypatch):
    """Unless CC names one, which is never replaced by another."""
    (tmp_path / "bin").mkdir()
    for name, script in (("cc", "exit 1"), ("gcc", f'exec "{os.environ["CC"]}" "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CC", "cc")
    assert "the C compiler fails: cc " in load_anew()
    monkeypatch.delenv("CC")
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
    """Backend "auto" takes `torch` and logs it once; the named backend raises."""
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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ('cc "-DX', r"CC must be a command as a shell reads it, got 'cc \"-DX': No closing quotation"),
        ("true", "the C compiler writes no library: true "),
        ("false", "the C compiler fails: false "),
        ("{tmp_path}", "is not on PATH"),
        ("{tmp_path}/text", "is not on PATH"),
        ("{tmp_path}/nonsense", r"the library compiled by \S*nonsense .* does not load"),
    ],
)
def test_a_command_that_is_no_compiler(cache, tmp_path, monkeypatch, command, message):
    (tmp_path / "text").write_text("not a program")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done\n')
    nonsense.chmod(0o755)
    monkeypatch.setenv("CC", command.format(tmp_path=tmp_path))
    assert re.search(message, load_anew())


def test_a_launcher_and_arguments(cache, tmp_path, monkeypatch):
    """As in CC="ccache gcc -m64"."""
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CC", f"{launcher} {os.environ['CC']} -DX='a b'")
    assert load_anew() is None


def test_no_compiler_by_that_name(cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert "no-such-compiler is not on PATH" in load_anew()


def test_no_memory_for_scratch(cache, fake_compiler, tmp_path):
    """Nothing has been computed in this case."""
    (tmp_path / "none.c").write_text("#include <stddef.h>\nvoid *none(size_t a, size_t n) { return NULL; }\n")
    fake_compiler(f"""
        case "$*" in *-dM*) real "$@"; exit;; esac
        real -Daligned_alloc=none "$@" "{tmp_path}/none.c"
    """)
    cpu.library.cache_clear()
    x, weight, A = torch.ones(1, 3, 2), torch.ones(2, 4), -torch.ones(2, 1)
    with pytest.raises(MemoryError, match="no memory for the scratch space of scan_forward"):
        selective_scan(x, x, A, x[..., :1], x[..., :1], backend="cpu")
    with pytest.raises(MemoryError, match="no memory for the scratch space of conv_forward"):
        causal_conv1d(x, weight, backend="cpu")
    conv_backward = torch.ops.vim_kernels.causal_conv1d_backward
    with pytest.raises(MemoryError, match="no memory for the scratch space of conv_backward"):
        conv_backward([x], x, [weight], [], None, None, True, [False], "cpu")
    heads = x.unsqueeze(2), x[..., :1], A[0], x[..., :1, None], x[..., :1, None]
    with pytest.raises(MemoryError, match="no memory for the scratch space of ssd_forward"):
        ssd(*heads, backend="cpu")
    with pytest.raises(MemoryError, match="no memory for the scratch space of ssd_backward"):
        torch.ops.vim_kernels.ssd_backward(heads[0], None, *heads, None, None, None, True, False)
    for length in (3, 2000):  # ordinary and huge pages
        with pytest.raises(MemoryError, match="no memory for the scratch space of bimamba_block"):
            bimamba_block(*block_inputs(length=length, d_inner=200, dtype=torch.float32))


@pytest.mark.parametrize(("wider", "flag"), [("__AVX512F__", "-mno-avx512f"), ("__AVX__", "-mno-avx")])
def test_narrower_registers(cache, monkeypatch, wider, flag):
    """Code for other machines, including decays beyond the range of fp32, and NaN."""
    if f"#define {wider} ".encode() not in cpu._compiler([])[1]:
        pytest.skip("this machine has none that are wider")
    monkeypatch.setenv("CC", f"{os.environ['CC']} {flag}")
    cpu.library.cache_clear()
    inputs = {name: t.detach() for name, t in scan_inputs(length=35, d_inner=37, d_state=17).items()}
    inputs["dt"][:, ::5] = 100
    inputs["dt"][:, 1::5] = -100
    inputs["u"][0, 20, 3] = inputs["dt"][1, 20, 4] = torch.nan
    inputs = {name: t.float() for name, t in inputs.items()}
    want = selective_scan(**{name: t.double() for name, t in inputs.items()}, backend="reference").float()
    found = selective_scan(**inputs, backend="cpu")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want[want.isfinite()].abs().max(), equal_nan=True)
    one = torch.ones(1, 2, 1)
    steps, growth = torch.tensor([0.5, 2.0]).view(1, 2, 1), torch.full((1, 1), 100.0)
    grown = selective_scan(one, steps, growth, one, one, dt_softplus=False, backend="cpu")
    assert grown.flatten().tolist() == [0.5, torch.inf]
    for dtype, limit in ((torch.float32, 3e-6), (torch.float64, 1e-13)):
        torch.manual_seed(0)
        given = ssd_inputs(60, heads=3, head_dim=19, groups=1, d_state=17)
        want, state = recurrence(**given)
        grads = torch.autograd.grad((want * want.detach().cos()).sum() + state.sum(), list(given.values()))
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}
        y, last = ssd(**leaves, return_last_state=True, backend="cpu")
        loss = (y * want.detach().to(dtype).cos()).sum() + last.sum()
        for a, b in zip(torch.autograd.grad(loss, list(leaves.values())), grads, strict=True):
            assert (a - b).norm() < limit * b.norm()
        x, weights = block_inputs(d_inner=37, d_state=17)
        want = by_operators(x, weights)
        assert (bimamba_block(x.to(dtype), weights_to(weights, dtype)) - want).norm() < limit * want.norm()


def scan_and_gradients(**shape) -> list[torch.Tensor]:
    inputs = pair_inputs(**shape, dtype=torch.float32)
    leaves = [t for value in inputs.values() for t in (value if isinstance(value, tuple) else (value,))]
    y = bidirectional_selective_scan(**inputs, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def convolution_and_gradients(packed: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 3000, 200), (200, 4), (200,), (3, 3, 200)
    x, weight, bias, state = leaves = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    cuts = torch.rand(3, 3000, generator=generator) < 0.2
    options = {"seq_idx": cuts.cumsum(1) if packed else None, "activation": "silu", "backend": "cpu"}
    y = causal_conv1d(x, weight, bias, initial_state=state, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def duality_and_gradients(**shape) -> list[torch.Tensor]:
    torch.manual_seed(0)
    leaves = ssd_inputs(200, head_dim=20, d_state=20, dtype=torch.float32, **shape)
    y = ssd(**leaves, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()), materialize_grads=True)]


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs the cpu backend")
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (scan_and_gradients, {"length": 300, "batch": 9}),
        (scan_and_gradients, {"length": 300, "batch": 1, "d_inner": 600}),
        (scan_and_gradients, {"length": 300, "batch": 2, "d_inner": 400, "groups": 2}),
        (convolution_and_gradients, {"packed": False}),
        (convolution_and_gradients, {"packed": True}),
        (duality_and_gradients, {"batch": 9, "heads": 8, "groups": 1}),
        (duality_and_gradients, {"batch": 16, "heads": 6, "groups": 2}),
        (duality_and_gradients, {"batch": 1, "heads": 12, "groups": 2}),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(function, options):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(function(**options))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_after_a_fork():
    """The OpenMP threads of the parent do not exist in the child, which would wait for them forever."""
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
