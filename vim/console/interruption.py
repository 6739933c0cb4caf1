"""Signals that ask a run to stop: Ctrl-C, and those of a scheduler or a closed terminal."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from .errors import InterruptedRunError

# SIGUSR1: Slurm's --signal, before a job's time limit. (Windows has only the first two.)
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))

# A launcher repeats to its children the signal that the scheduler or terminal has already sent them.
SECONDS_OF_AN_ECHO = 2.0

Handler = Callable[[int, FrameType | None], Any] | int | None  # as signal.signal takes and returns


class Interruption:
    """In its `with` block, a signal to stop raises InterruptedRunError; in a `postponed` block it waits in `asked`.

    A second signal, two seconds or more after the first, ends the process at once, even if it hangs: a thread watches
    for it. Under nohup, SIGHUP stays ignored. Python handles signals in the main thread alone; in other threads this
    class has no effect.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._postponed = False
        self._process = os.getpid()
        self._former: dict[signal.Signals, Handler] = {}
        self._former_wakeup = -1
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._watch()
            ignored = [n for n in SIGNALS if n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN]
            self._former = {n: signal.signal(n, self._handle) for n in SIGNALS if n not in ignored}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._former_wakeup)
            os.write(self._pipe[1], b"\0")  # ends the thread
            os.close(self._pipe[1])

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A block that checks `asked` itself. A signal that it does not answer is raised at its end."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
        self.obey()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Part of a `postponed` block in which a signal is raised at once."""
        before, self._postponed = self._postponed, False
        try:
            self.obey()
            yield
        finally:
            self._postponed = before

    def obey(self) -> None:
        """Raise InterruptedRunError if a signal has arrived."""
        if self.asked is not None:
            raise InterruptedRunError(f"stopped by {signal.Signals(self.asked).name}", self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A worker inherits this handler when it is forked, and leaves signals to its parent.
        if self.asked is None and os.getpid() == self._process:
            self.asked = number
            if not self._postponed:
                self.obey()

    def _watch(self) -> None:
        """Let the interpreter write signals to a pipe, and a thread read them: handlers run in the main thread, which
        may hang."""
        if sys.platform == "win32":  # which writes signals to sockets alone
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._former_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_end_at_the_second, args=(self._pipe[0],), daemon=True).start()


def _end_at_the_second(pipe: int) -> None:
    first = None
    while number := os.read(pipe, 1)[0]:
        if number not in SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > SECONDS_OF_AN_ECHO:
            os.write(2, b"error: ended at once by a second signal; what was saved before remains\n")
            os._exit(128 + number)
    os.close(pipe)


@contextmanager
def interruptible(how_to_go_on: Callable[[], str]) -> Iterator[Interruption]:
    """An active Interruption, whose error ends with what to do next."""
    try:
        with Interruption() as interruption:
            yield interruption
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; {how_to_go_on()}", error.number) from None
