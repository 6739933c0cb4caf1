"""Signals that ask a run to stop: Ctrl-C, and the SIGTERM of a scheduler that takes the machine back."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from .errors import InterruptedRunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, a signal to stop raises InterruptedRunError; in a `postponed` block it waits in `asked`.

    Where the interpreter does not let it handle signals, outside of the main thread, they do what they did.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._postponed = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A block that looks at `asked` itself; what it has left unanswered is raised at its end."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
        self.obey()

    def obey(self) -> None:
        """Raise what was asked for."""
        if self.asked is not None:
            raise InterruptedRunError(f"stopped by {signal.Signals(self.asked).name}", self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if not self._postponed:
            self.obey()


@contextmanager
def interruptible(how_to_go_on: Callable[[], str]) -> Iterator[Interruption]:
    """An Interruption, entered, whose error ends with what to do next."""
    try:
        with Interruption() as interruption:
            yield interruption
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; {how_to_go_on()}", error.number) from None
