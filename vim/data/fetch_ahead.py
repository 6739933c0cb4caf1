"""Shards that are fetched before they are wanted, by a process of their own."""

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
    """Has shards fetched while those before them are read.

    One that cannot be fetched is left to the loading process that wants it, whose error says why.

    Args:
        fetch: gets a shard by its number; it is copied to the other process.
    """

    def __init__(self, fetch: Callable[[int], None]):
        self.fetch = fetch
        self.process: BaseProcess | None = None
        self._wanted: Any = None

    def __call__(self, shards: Sequence[int]) -> None:
        """Ask for shards, the first ones first."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy what threads of the training hold locked
            self._wanted = context.SimpleQueue()
            self.process = context.Process(target=_fetch_wanted, args=(self.fetch, self._wanted), daemon=True)
            self.process.start()
            weakref.finalize(self, self.process.terminate)
        self._wanted.put(list(shards))


def _fetch_wanted(fetch: Callable[[int], None], wanted: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; this one ends with its parent
    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def attempt(shard: int) -> None:
        with suppress(DataError):
            fetch(shard)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        while True:
            list(pool.map(attempt, wanted.get()))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
