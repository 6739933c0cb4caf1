"""Errors that end a tool, with a message for the user."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """An error that the tools print in one line, without a traceback: the message says all there is to know."""


class ConfigError(UserError, ValueError):
    """The configuration does not fit itself, the model or the data."""


class RunError(UserError, RuntimeError):
    """The run folder cannot be used as asked, or training cannot go on."""


class InterruptedRunError(RunError):
    """A signal, Ctrl-C if no other is given, stopped the run; the message says how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells give to a program that a signal stops: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown word: the nearest known ones, or what else to do."""
    near = difflib.get_close_matches(word, list(known))
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {otherwise}"
