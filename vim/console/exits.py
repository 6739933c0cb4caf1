"""Errors for the user without a traceback."""

import io
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vim.files import why

from .errors import InterruptedRunError, UserError


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program at once; print the message alone if it tells the user everything.

    Characters that the terminal's encoding lacks print as escapes: they must not end a finished run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        # The traceback of the worker precedes the message of a worker's error.
        message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, InterruptedRunError) else 1)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{why(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        end_children()


def end_children() -> None:
    """Terminate worker processes: with a GPU, torch would wait five seconds for each, one after the other."""
    children = multiprocessing.active_children()
    # The signal kills a worker that has only just started, and torch's handler would raise an error here.
    main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for process in children:
        process.terminate()
    for process in children:
        process.join(1)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
