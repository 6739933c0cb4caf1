"""Processes that tests wait for."""

import subprocess


def outputs(*processes: subprocess.Popen) -> list[tuple]:
    """What each process writes, (out, err), when all have ended.

    No limit of its own: pytest's ends a test whose process hangs, and then none of them lives on.
    """
    try:
        return [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
