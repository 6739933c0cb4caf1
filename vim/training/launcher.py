"""Stops a run when its launcher dies, which may leave its processes behind."""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

_LAUNCHER = re.compile(
    r"(^|/)(accelerate|accelerate-launch|torchrun)$|^accelerate\.commands|^torch\.distributed\.(run|launch)$"
)
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def end_with_the_launcher() -> None:
    """Make the kernel send SIGTERM to this process when its parent dies, if that is accelerate's or torch's launcher.

    (`accelerate launch` with one process dies from SIGTERM without passing it on.) Other parents, such as a shell,
    nohup or a scheduler, may end before the run. Linux only: it has this signal, and shows the parent's command line.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    if not any(_LAUNCHER.search(word) for word in words[:4]):  # python, its options, the launcher
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died in the meantime
        os.kill(os.getpid(), signal.SIGTERM)
