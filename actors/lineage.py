"""Processes that do not outlive the one that started them."""

import ctypes
import signal
from contextlib import suppress

import psutil

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on the kernel kills this process when the thread that started it ends, however that comes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_descendants(title: str) -> None:
    """End those processes below this one that have `title` in their command line."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                process.kill()
