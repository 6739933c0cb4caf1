"""Errors that end a tool, with a message for the user."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """An error whose message tells the user everything: tools print it in one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that contradicts itself, or does not fit the model or the data."""


class RunError(UserError, RuntimeError):
    """A run folder that cannot be used as requested, or training that cannot go on."""


class InterruptedRunError(RunError):
    """A signal (Ctrl-C by default) stopped the run; the message says how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code of a program that a signal ends, as in shells: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """End of a message about an unknown word: the most similar known words, or other advice."""
    near = difflib.get_close_matches(word, list(known))
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {otherwise}"
