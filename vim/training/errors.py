"""What stops a run, in words for its owner."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The configuration does not fit itself, the model or the data."""


class RunError(RuntimeError):
    """The run folder cannot be used as asked, or training cannot go on."""


class InterruptedRunError(RunError):
    """The user stopped the run; the message says how to go on."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown word: the nearest known ones, or what else to do."""
    near = difflib.get_close_matches(word, list(known))
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {otherwise}"
