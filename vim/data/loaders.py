"""Data sets and data loaders for training and evaluation."""

import errno
import functools
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from .config import BadImages
from .decode import IMAGE_MODES
from .errors import DataError, ShardError, WorkerError
from .packed import Augmented, PackedImages
from .randomness import derive_seed, preserved_generators, seed_cpu_generators
from .sampler import KeyedSampler, SampleKey
from .sources import ImageSource, load_labelled
from .transforms import TrainTransform, Transform

# Image, label, and names of unreadable images.
TrainSample = tuple[Augmented, int, list[str]]
Sample = tuple[Tensor, int, list[str]]
# Images (B, C, H, W), labels (B,), and names of unreadable images of the batch.
TrainBatch = tuple[PackedImages, Tensor, list[str]]
Batch = tuple[Tensor, Tensor, list[str]]
Loaded = TypeVar("Loaded")

NO_LABEL = -1  # label of an unreadable image in evaluation
MOST_REPLACEMENTS = 10  # consecutive ones; after that, more is wrong than single files


class TrainImages(Dataset[TrainSample]):
    """Augmented images. A SampleKey determines its image, in any process and order.

    Args:
        bad_images: "skip" replaces an unreadable image with another one.
        early: transforms of the first epochs, one per epoch, if they differ.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
        seed: int,
        in_chans: int = 3,
        bad_images: BadImages = "raise",
        early: Sequence[TrainTransform] = (),
    ):
        self.source, self.transform, self.seed, self.in_chans = source, transform, seed, in_chans
        self.bad_images, self.early = bad_images, early

    def __len__(self) -> int:
        return len(self.source)

    def name(self, key: SampleKey) -> str:
        return self.source.name(key.image)

    def __getitem__(self, key: SampleKey) -> TrainSample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[TrainSample]:
        # torch's loader asks for whole batches: saving the generators costs as much as augmenting a small image.
        with preserved_generators():
            load = functools.lru_cache(1)(self._load)  # repeats of an image are consecutive: decode it once
            return [self._augmented(key, load) for key in keys]

    def collate(self, samples: list[TrainSample]) -> TrainBatch:
        images, labels, bad = _transposed(samples)
        return PackedImages.pack(images, self.transform.mean, self.transform.std), labels, bad

    def _augmented(self, key: SampleKey, load: Callable[[int], tuple[Image.Image, int]]) -> TrainSample:
        (image, label), bad = load_or_replace(load, self.source.name, key, len(self), self.seed, self.bad_images)
        seed_cpu_generators(derive_seed("augment", self.seed, *key))
        transform = self.early[key.epoch] if key.epoch < len(self.early) else self.transform
        return transform(image), label, bad

    def _load(self, index: int) -> tuple[Image.Image, int]:
        return load_labelled(self.source, index, self.in_chans)


class EvalImages(Dataset[Sample]):
    """Images (in_chans, H, W) in the order of the source.

    Args:
        bad_images: "skip" replaces an unreadable image with a black one labelled NO_LABEL.
    """

    def __init__(self, source: ImageSource, transform: Transform, in_chans: int = 3, bad_images: BadImages = "raise"):
        self.source, self.transform, self.in_chans, self.bad_images = source, transform, in_chans, bad_images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, label = load_labelled(self.source, index, self.in_chans)
        except ShardError:
            raise
        except DataError:
            if self.bad_images == "raise":
                raise
            black = Image.new(IMAGE_MODES[self.in_chans], (1, 1))
            return self.transform(black), NO_LABEL, [self.source.name(index)]
        return self.transform(image), label, []


def load_or_replace(
    load: Callable[[int], Loaded],
    name: Callable[[int], str],
    key: SampleKey,
    size: int,
    seed: int,
    bad_images: BadImages,
) -> tuple[Loaded, list[str]]:
    """The image of a key. If it is unreadable and may be skipped, another image that the key determines.

    Args:
        load: returns an image by its number, below `size`, or raises DataError.
        name: returns the name of an image by its number.

    Returns: the result of `load`, and the names of unreadable images.
    """
    bad: list[str] = []
    for attempt in range(MOST_REPLACEMENTS + 1):
        index = key.image if attempt == 0 else derive_seed("instead", seed, *key, attempt) % size
        try:
            return load(index), bad
        except ShardError:
            raise
        except DataError:
            if bad_images == "raise" or attempt == MOST_REPLACEMENTS:
                raise
            bad.append(name(index))
    raise AssertionError


def collate(samples: list[Sample]) -> Batch:
    images, labels, bad = _transposed(samples)
    return torch.stack(images), labels, bad


def _transposed(samples: list[tuple[Loaded, int, list[str]]]) -> tuple[tuple[Loaded, ...], Tensor, list[str]]:
    """Images, labels (B,), and names of unreadable images."""
    images, labels, bad = zip(*samples, strict=True)
    return images, torch.tensor(labels), [path for paths in bad for path in paths]


def train_loader(images: TrainImages, sampler: KeyedSampler, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches in the sampler's order.

    `accelerator.prepare` distributes them to the processes and moves them to the device, where PackedImages become
    float tensors.
    """
    return loader(images, batch_size, num_workers, sampler=sampler, collate_fn=images.collate)


def eval_loader(images: EvalImages, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches in the source's order; the last one may be smaller."""
    return loader(images, batch_size, num_workers, shuffle=False, collate_fn=collate)


def loader(
    images: Dataset,
    batch_size: int,
    num_workers: int,
    *,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    **options: Any,
) -> DataLoader:
    """torch's DataLoader with `options` of its own, such as the order. Iterate over it with `batches_of`."""
    return DataLoader(
        images,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
        collate_fn=functools.partial(_collate_to_share, collate_fn),
        **options,
    )


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader that accelerate has prepared.

    Errors appear only here, where a batch is fetched. torch alone reports the death of a worker wherever the main
    thread happens to be, for example between a weight update and the count of updates.

    Raises: WorkerError for a worker that died or cannot hand over a batch, and any error raised in a worker.
    """
    batches = iter(loader)
    while True:
        try:
            with _deaths.raised():
                batch = next(batches)
        except StopIteration:
            return
        except DataError as error:
            raise type(error)(_without_traceback(error)) from error
        except (EOFError, OSError, RuntimeError) as error:
            # A worker that dies while it hands over a batch causes an EOFError or an OSError.
            of_worker = not isinstance(error, RuntimeError) or _ABOUT_WORKERS.search(str(error))
            if not (loader.num_workers and of_worker):
                raise
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                what = _shared_memory()
            elif isinstance(error, RuntimeError):
                what = _without_traceback(error)
            else:
                what = f"it ended while it handed over a batch ({_without_traceback(error)})"
            raise WorkerError(
                f"a data worker has failed: {what}; data.num_workers 0 loads without workers, and shows more"
            ) from error
        yield batch


_ABOUT_WORKERS = re.compile(r"DataLoader worker|with the workers|Pin memory thread")


def _without_traceback(error: Exception) -> str:
    """The message alone, in one line: an error of a worker arrives with the worker's traceback before it."""
    message = " ".join(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].split()).rstrip(".")
    return message or type(error).__name__


class _Deaths:
    """Defers torch's SIGCHLD handler, which raises an error if a worker has died, to the inside of `raised`."""

    def __init__(self) -> None:
        self.torchs: Callable[[int, Any], Any] | None = None
        self.fetching = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        self.fetching = True
        try:
            self._handle()  # reports deaths since the last batch
            yield
        finally:
            self.fetching = False
            self._take_over()

    def _take_over(self) -> None:
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        present = signal.getsignal(signal.SIGCHLD)
        if callable(present) and present != self._handle:
            self.torchs = present
            signal.signal(signal.SIGCHLD, self._handle)

    def _handle(self, number: int = 0, frame: Any = None) -> None:
        if self.fetching and self.torchs is not None:
            self.torchs(number, frame)


_deaths = _Deaths()


def _collate_to_share(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """Collate a batch; in a worker, also move it to shared memory.

    torch would do that in a thread, which silently drops a batch that does not fit; the run would wait forever.
    """
    batch = collate(samples)
    if get_worker_info() is None:
        return batch
    tensors = list(_tensors(batch))
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors) / 2**20
        raise WorkerError(
            f"a data worker cannot hand over a batch of {size:.1f} MiB: {_shared_memory()}; lower data.num_workers or "
            f"data.batch_size, or raise the shared memory (docker run --shm-size): {error}"
        ) from error
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
    elif isinstance(batch, dict):
        yield from _tensors(list(batch.values()))
    elif is_dataclass(batch):
        yield from _tensors([getattr(batch, f.name) for f in fields(batch)])


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "there is not enough shared memory"
    return f"/dev/shm has {usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB free"


def _die_with_a_lost_batch() -> None:
    """End the worker if it fails to hand over a batch, for example for too many open files.

    torch's thread would drop the batch and continue, and the parent would wait for it forever. The parent notices a
    worker that dies.
    """

    def end(error: Exception, batch: Any) -> None:
        print(f"error: data worker {os.getpid()} cannot hand over a batch: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def leave_signals_to_the_parent(worker: int) -> None:
    """Initialise a worker so that it ends only when its parent says so or is gone, or when it loses a batch.

    Ctrl-C and a scheduler's signals reach every process of the group, but the parent still needs its workers to finish
    the current step.
    """
    _die_with_a_lost_batch()
    signal.set_wakeup_fd(-1)  # it belongs to the parent
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS
        return
    parent, starter = multiprocessing.parent_process(), os.getppid()  # a fork server may have started it
    assert parent is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while os.getppid() == starter:
            sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if sent is not None and sent.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
