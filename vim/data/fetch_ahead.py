"""Prefetching of shards, in a separate process."""

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

from .errors import DataError

AT_A_TIME = 4


class FetchAhead:
    """Fetches shards while earlier ones are read.

    It skips a shard that cannot be fetched. The worker that needs the shard will report the error.

    Args:
        fetch: fetches a shard by its number; it is pickled for the other process.
    """

    def __init__(self, fetch: Callable[[int], None]):
        self.fetch = fetch
        self.process: BaseProcess | None = None
        self._requests: Any = None

    def __call__(self, shards: Sequence[int]) -> None:
        """Request shards, to be fetched in this order."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
            self._requests = context.SimpleQueue()
            self.process = context.Process(target=_fetch_requested, args=(self.fetch, self._requests), daemon=True)
            self.process.start()
            weakref.finalize(self, self.process.terminate)
        self._requests.put(list(shards))


def _fetch_requested(fetch: Callable[[int], None], requests: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and this one ends with its parent
    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def attempt(shard: int) -> None:
        with suppress(DataError):
            fetch(shard)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        while True:
            list(pool.map(attempt, requests.get()))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
