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
    """One augmented sample. The epoch is part of it, so that workers that live on need not be told the new epoch."""

    epoch: int
    image: int
    repeat: int


class KeyedSampler(Sampler[SampleKey]):
    """A random order that depends on (seed, epoch) alone, in whole updates.

    It yields the order of all processes together; accelerate deals out the batches. So the images of an update are the
    same for any number of processes with the same total batch.

    Args:
        size: images in the data set.
        seed: of the run.
        repeats: times that an image follows itself, each with another augmentation; the epoch keeps its length and
            sees fewer images (repeated augmentation, Hoffer et al. 2020, arXiv 1901.09335).
        multiple_of: samples in an update, over all processes and accumulated steps. What is left over at the end of
            the order waits for another epoch.
        shards: images in each shard of a data set that is better read a few shards at a time: these come in random
            order, and only the images of `window` shards that follow each other are mixed. None: all are mixed.
        ahead: told as a window begins which shards it has, and after them those of the next.

    Raises: DataError if there is not even one update.
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
        """Leave out so many samples of every epoch from now on: those that a resumed run had done."""
        self.start = position

    def __len__(self) -> int:
        """Samples to come in an epoch."""
        return self.length - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        keys = self.keys(self.start, self.length)
        return iter(keys) if self.ahead is None else self._announced(keys, self.ahead)

    def keys(self, first: int, end: int) -> list[SampleKey]:
        """The samples from one position of the epoch's order up to another."""
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
        """The shards, by windows, in order."""
        assert self.shards is not None
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        return [order[first : first + self.window] for first in range(0, len(order), self.window)]

    def _order(self, epoch: int) -> Tensor:
        """Of the images."""
        generator = self._generator(epoch)
        if self.shards is None:
            return torch.randperm(self.size, generator=generator)
        images = torch.arange(self.size).split(list(self.shards))
        windows = [torch.cat([images[s] for s in window]) for window in self._windows(generator)]
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])
