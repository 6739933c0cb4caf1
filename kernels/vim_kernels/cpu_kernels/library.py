"""The library of backend `cpu`: C, compiled on first use with the system's compiler into the user's cache.

Each precision has its own library. Its file name has two hashes. The first covers everything that determines the
machine code, so machines, compilers and versions of this package can share a cache. The second is a checksum of the
file: loading a truncated library would kill the process. A file that another user can write is never loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..directions import CHECKPOINT_INTERVAL

_log = logging.getLogger("vim_kernels")

_SOURCES = Path(__file__).parents[1] / "csrc"
_FLAGS = (
    "-std=gnu11 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fPIC -shared -pthread "
    f"-DCHUNK={CHECKPOINT_INTERVAL}"
).split()


def load_error() -> str | None:
    """Why the backend cannot run on this machine; None if it can. Compiles the library if necessary."""
    try:
        library(torch.float32)
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels in fp32 or fp64.

    Raises: RuntimeError with the reason if they cannot be compiled or loaded.
    """
    command, macros = _compiler(["-DDOUBLE"] if dtype == torch.float64 else [])
    key = hashlib.sha256()
    sources = [path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]"))]
    for part in (*sources, shlex.join(command).encode(), macros):
        key.update(hashlib.sha256(part).digest())
    name = f"{sysconfig.get_platform()}-{key.hexdigest()[:24]}"
    try:
        return _cached(_cache_folder(), name, command)
    except (OSError, RuntimeError) as error:  # disk read-only, full or noexec; files of others
        _log.warning("compiling the CPU kernels into a temporary folder, because the cache does not work: %s", error)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vim_kernels_"))
            path = _compile(Path(folder), name, command)
        except OSError as error:
            raise RuntimeError(f"there is no folder to keep the compiled CPU kernels in: {error}") from error
        try:
            return ctypes.CDLL(str(path))  # a loaded library does not need its file
        except OSError as error:
            raise RuntimeError(f"the library compiled by {shlex.join(command)} does not load: {error}") from error


def _compiler(flags: list[str]) -> tuple[list[str], bytes]:
    """The compiler command, and its predefined macros, which reflect its version and the CPU's features.

    Raises: RuntimeError if there is no compiler or none works.
    """
    if sys.platform == "win32":
        raise RuntimeError("the CPU kernels need POSIX threads, which Windows does not have")
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise RuntimeError(f"CC must be a command as a shell reads it, got {os.environ['CC']!r}: {error}") from error
    wanted = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    found = [command for command in wanted if shutil.which(command[0])]
    if not found:
        names = " or ".join(command[0] for command in wanted)
        raise RuntimeError(f"there is no C compiler: {names} is not on PATH; install one, or set CC to its command")
    for command in found:
        for native in (["-march=native"], []):  # some compilers refuse it
            full = [*command, *_FLAGS, *flags, *native]
            failure, macros = _run_compiler([*full, "-dM", "-E", "-x", "c", os.devnull])
            if failure is None:
                return full, macros
    raise RuntimeError(failure)


def _run_compiler(command: list[str]) -> tuple[str | None, bytes]:
    """The failure (None if it worked), and the output."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        return f"the C compiler does not start: {error}", b""
    if done.returncode == 0:
        return None, done.stdout
    return f"the C compiler fails: {shlex.join(command)}: {done.stderr.decode(errors='replace')[-1000:]}", b""


def _cache_folder() -> Path:
    """The folder of compiled kernels, created if necessary. Raises: OSError."""
    if chosen := os.environ.get("VIM_KERNELS_CACHE"):
        folder = Path(_STARTED_IN, os.path.expanduser(chosen))
    elif os.path.isabs(chosen := os.environ.get("XDG_CACHE_HOME", "")):  # the standard ignores a relative one
        folder = Path(chosen) / "vim_kernels"
    else:
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise OSError("there is no home directory")
        folder = Path(home, "Library/Caches" if sys.platform == "darwin" else ".cache") / "vim_kernels"
    if not folder.is_absolute():
        raise OSError(f"VIM_KERNELS_CACHE={chosen} is relative to a working directory that no longer exists")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _started_in() -> str:
    try:
        return os.getcwd()
    except OSError:  # deleted
        return ""


_STARTED_IN = _started_in()  # so that a relative cache survives a chdir


def _cached(folder: Path, name: str, command: list[str]) -> ctypes.CDLL:
    """The library of this name, compiled if no intact one exists. Raises: OSError, RuntimeError (the compiler)."""
    if (fault := _others_may_write(folder)) is not None:
        raise PermissionError(f"{folder} {fault}; set VIM_KERNELS_CACHE to a folder of your own")
    if (found := _load(folder, name)) is not None:
        return found
    with _alone(folder) as alone:
        for left in folder.glob("build-*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)  # left by a killed compilation
        found = _load(folder, name)  # another process may have compiled it meanwhile
        return ctypes.CDLL(str(_compile(folder, name, command))) if found is None else found


def _load(folder: Path, name: str) -> ctypes.CDLL | None:
    """A library of this name from the folder; damaged ones are removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if (fault := _fault(path)) is not None:
            _log.warning("compiling the CPU kernels again, because %s %s", path, fault)
            path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(OSError):  # compiled against another C library
            return ctypes.CDLL(str(path))
    return None


def _fault(path: Path) -> str | None:
    """Why a file must not be loaded; None if it may."""
    if path.name != f"{path.name.rpartition('-')[0]}-{_digest(path)}.so":
        return "is damaged: its checksum is not the one in its name"
    return _others_may_write(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _others_may_write(path: Path) -> str | None:
    """How another user can write the file; None if only this user and root can."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user, uid {found.st_uid}"
    if found.st_mode & 0o022:
        return f"can be written by other users (mode {found.st_mode & 0o777:o}; fix it with `chmod go-w`)"
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, so that one process compiles and the others wait. Yields whether it is held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock was acquired within the time of a compilation. Some network disks have no locks."""
    import fcntl  # not on Windows

    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            break
    return False


def _compile(folder: Path, name: str, command: list[str]) -> Path:
    """Compile the library; it appears whole or not at all. Raises: OSError, RuntimeError (the compiler)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-", ignore_cleanup_errors=True) as own:
        built = Path(own) / "kernels.so"
        sources = [str(source) for source in sorted(_SOURCES.glob("*.c"))]
        failure, _ = _run_compiler([*command, *sources, "-o", str(built), "-lm"])
        if failure is None and not built.is_file():
            failure = f"the C compiler writes no library: {shlex.join(command)}"
        if failure is not None:
            raise RuntimeError(failure)
        built.chmod(0o755)  # regardless of the umask; see `_others_may_write`
        with open(built, "rb") as file:
            os.fsync(file)  # a machine crash must not leave the name without the content
        path = folder / f"{name}-{_digest(built)}.so"
        os.replace(built, path)
    _log.info("compiled the CPU kernels with %s in %.1f s: %s", command[0], time.perf_counter() - start, path)
    return path


# Shared by the launchers of the scan and the convolution.


class Sequence(ctypes.Structure):
    """The struct of csrc/layout.h; also used for its Flags and Numbers."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


class Call(ctypes.Structure):
    """The first fields of every kernel's argument."""

    _fields_: ClassVar[tuple] = (("team", ctypes.c_void_p), ("threads", ctypes.c_int64))


def readable(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`t` in the kernel's precision with a contiguous last dimension; copied only if necessary."""
    if t is None:
        return None
    if t.dtype != dtype:
        t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


def per_step(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Per-step values (B, L) as a sequence of one channel."""
    return None if t is None else t.to(dtype).unsqueeze(-1)


def dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`t` in the kernel's precision and contiguous; copied only if necessary."""
    return None if t is None else t.to(dtype).contiguous()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor for the kernel to write; a large one uses huge pages on Linux.

    Each call gets memory of this size fresh from the system. Its page faults took a third of the time of long scans.
    """
    t = torch.empty(shape, dtype=dtype)
    if sys.platform == "linux" and t.nbytes >= 4 * _HUGE_PAGE:
        begin = -(-t.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        size = (t.data_ptr() + t.nbytes - begin) // _HUGE_PAGE * _HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # may be ignored
    return t


def fill(
    struct: ctypes.Structure, sequences: Mapping[str, Tensor | None], arrays: Mapping[str, Tensor | None], reverse: bool
) -> None:
    """Point the fields of `struct` at tensors, which the caller keeps alive; None leaves a field NULL.

    sequences: (B, L, [groups,] channels or states). arrays: contiguous.
    """
    for name, t in sequences.items():
        if t is not None:
            batch, step, *group, _ = t.stride()
            data = t.data_ptr()
            if reverse:
                data += (t.shape[1] - 1) * step * t.element_size()
                step = -step
            setattr(struct, name, Sequence(data, batch, step, *group))
    for name, t in arrays.items():
        if t is not None:
            setattr(struct, name, t.data_ptr())


def run(kernel: str, dtype: torch.dtype, call: Call) -> None:
    """Run a kernel of csrc/ with torch's number of threads."""
    call.team, call.threads = _team(), torch.get_num_threads()
    if getattr(library(dtype), kernel)(ctypes.byref(call)):
        raise MemoryError(f"no memory for the scratch space of {kernel}")


_PROCESS = os.getpid()
_HUGE_PAGE = 2 << 20
_libc = functools.cache(functools.partial(ctypes.CDLL, None))


def _team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; None if it cannot be used."""
    return _openmp() if os.getpid() == _PROCESS else None  # libgomp's threads do not survive a fork


@functools.cache
def _openmp() -> int | None:
    function = getattr(_libc(), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
