"""The order of the training samples."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from .errors import DataError
from .randomness import derive_seed


class SampleKey(NamedTuple):
    """One augmented sample. It contains the epoch, so persistent workers need not be told of a new one."""

    epoch: int
    image: int
    repeat: int


class KeyedSampler(Sampler[SampleKey]):
    """A random order that depends on (seed, epoch) alone, in whole updates.

    It yields the samples of all processes; accelerate distributes the batches. So the images of an update are the same
    for any number of processes with the same total batch.

    Args:
        size: number of images in the data set.
        seed: seed of the run.
        repeats: number of consecutive samples per image, each augmented differently. The epoch keeps its length and has
            fewer images (repeated augmentation, Hoffer et al. 2020, arXiv 1901.09335).
        multiple_of: samples per update, over all processes and accumulated steps. The epoch drops the remainder.
        shards: number of images per shard, if only a few shards should be open at a time. Shards come in random order,
            and each `window` consecutive shards are shuffled together. None: all images are shuffled together.
        ahead: called at the start of a window with its shards, followed by those of the next window.

    Raises: DataError if the data set is smaller than one update.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        repeats: int = 1,
        multiple_of: int = 1,
        shards: Sequence[int] | None = None,
        window: int = 1,
        ahead: Callable[[list[int]], None] | None = None,
    ):
        if multiple_of > size:
            raise DataError(
                f"an update takes {multiple_of} images (batch size x processes x accumulated steps), "
                f"the training split has {size}; lower data.batch_size"
            )
        assert shards is None or sum(shards) == size
        self.size, self.seed, self.repeats = size, seed, repeats
        self.shards, self.window, self.ahead = shards, window, ahead
        self.length = size // multiple_of * multiple_of
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def start_at(self, position: int) -> None:
        """Skip the samples before this position in every epoch from now on, for a resumed run."""
        self.start = position

    def __len__(self) -> int:
        """Number of samples in an epoch, without skipped ones."""
        return self.length - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        keys = self.keys(self.start, self.length)
        return iter(keys) if self.ahead is None else self._announced(keys, self.ahead)

    def keys(self, first: int, end: int) -> list[SampleKey]:
        """The samples from one position of the epoch's order to another, exclusive."""
        order = self._order(self.epoch).tolist()
        return [SampleKey(self.epoch, order[i // self.repeats], i % self.repeats) for i in range(first, end)]

    def _announced(self, keys: list[SampleKey], ahead: Callable[[list[int]], None]) -> Iterator[SampleKey]:
        windows = self._windows(self._generator(self.epoch))
        assert self.shards is not None
        begins = [0, *accumulate(self.repeats * sum(self.shards[s] for s in window) for window in windows)]
        windows = [window for window, begin in zip(windows, begins, strict=False) if begin < self.length]
        windows.append(self._windows(self._generator(self.epoch + 1))[0])
        place = -1
        for position, key in enumerate(keys, self.start):
            before = place
            while place + 2 < len(windows) and position >= begins[place + 1]:
                place += 1
            if place > before:
                ahead([*windows[place], *windows[place + 1]])
            yield key

    def _generator(self, epoch: int) -> Generator:
        return torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))

    def _windows(self, generator: Generator) -> list[list[int]]:
        """The shards of each window, in order."""
        assert self.shards is not None
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        return [order[first : first + self.window] for first in range(0, len(order), self.window)]

    def _order(self, epoch: int) -> Tensor:
        """Order of the images."""
        generator = self._generator(epoch)
        if self.shards is None:
            return torch.randperm(self.size, generator=generator)
        images = torch.arange(self.size).split(list(self.shards))
        windows = [torch.cat([images[s] for s in window]) for window in self._windows(generator)]
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])
