"""Progress: a bar on a terminal, plain lines in a file or pipe, nothing on processes other than the main one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from .escapes import visible

SECONDS_BETWEEN_LINES = 60


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: no markup in brackets, no :emoji: names, no coloured numbers."""
    return Console(highlight=False, markup=False, emoji=False, **options)


class Progress:
    """Prints how a run is going.

    Args:
        enabled: True on the main process alone.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.console = plain_console(soft_wrap=True)

    def line(self, text: str) -> None:
        if not self.enabled:
            return
        text = "\n".join(map(visible, text.split("\n")))
        if self.console.is_terminal:
            self.console.print(text)
        else:
            print(text, flush=True)

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A bar of `total` steps, of which `done` are done; without a terminal, a line a minute. Call the function that
        it yields after each step, with news or "".

        with progress.bar("epoch 3", len(loader)) as advance:
            for batch in loader:
                advance("loss 0.61")
        """
        name = visible(name)
        if not self.enabled:
            yield lambda news: None
        elif self.console.is_terminal:
            title = TextColumn("{task.description}", markup=False)
            columns = title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            with RichProgress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=total, completed=done)
                yield lambda news: bar.update(task, advance=1, description=f"{name}  {news}" if news else name)
        else:
            yield self._line_a_minute(name, total, done)

    def _line_a_minute(self, name: str, total: int, done: int) -> Callable[[str], None]:
        last = time.monotonic()

        def advance(news: str) -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.line(f"{name}  {done}/{total}  {news}")

        return advance
