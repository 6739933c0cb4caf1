"""The end of a launcher, which may leave its processes behind."""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

_LAUNCHER = re.compile(
    r"(^|/)(accelerate|accelerate-launch|torchrun)$|^accelerate\.commands|^torch\.distributed\.(run|launch)$"
)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_the_launcher() -> None:
    """Have the system send this process a SIGTERM when its parent dies, if that is accelerate's or torch's launcher.

    (`accelerate launch` with one process dies of a SIGTERM, and does not pass it on.) A shell, nohup or a scheduler may
    end before the run does. On Linux alone, which has such a signal and shows what the parent is.
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
    if os.getppid() != parent:  # it died meanwhile
        os.kill(os.getpid(), signal.SIGTERM)
