"""Waiting for processes in tests."""

import subprocess


def outputs(*processes: subprocess.Popen) -> list[tuple]:
    """Wait for all processes; return (stdout, stderr) of each.

    Has no timeout: pytest's ends a test whose process hangs, and then this kills all of them.
    """
    try:
        return [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
