"""Errors of a data set, with a message for the user."""

from vim.console.errors import UserError


class DataError(UserError, ValueError):
    """A data set folder or file cannot be used as it is; the message names the path and says what to do."""


class WorkerError(DataError):
    """A process that loads images has died, or cannot hand over what it has loaded."""


class ShardError(DataError):
    """A shard cannot be fetched or read. Thousands of images are missing then, so that nobody skips it as a bad one."""


def reason(error: Exception) -> str:
    """What another library says is wrong, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
