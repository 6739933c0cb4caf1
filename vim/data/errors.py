"""Errors about a data set, with a message for the user."""

from vim.console.errors import UserError


class DataError(UserError, ValueError):
    """A folder or file of a data set cannot be used; the message names the path and the remedy."""


class WorkerError(DataError):
    """A worker has died, or cannot hand over a batch."""


class ShardError(DataError):
    """A shard cannot be fetched or read. This is never skipped as a bad image: thousands of images are missing."""


def reason(error: Exception) -> str:
    """Another library's error message, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
