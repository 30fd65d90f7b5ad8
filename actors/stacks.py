"""The stacks of a process that hangs, and the end of a process with all that it has started. Needs no Ray."""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

STACKS = "minigpt_ray_stacks"
"""Name of the file in memory."""
STACK_SECONDS = 3.0
"""How long a process may take to write its stacks."""
LONGEST_REPORT = 80
"""Lines of stacks."""


def keep_stacks_at_hand() -> None:
    """For a process that may hang, at its beginning."""
    faulthandler.register(signal.SIGUSR1, file=os.memfd_create(STACKS), all_threads=True)


def examine_and_kill(pid: int) -> tuple[str, str]:
    """State and stacks of a process of this host, which ends here with its children."""
    try:
        process = psutil.Process(pid)
        state, stacks = process.status(), _stacks(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return "gone", ""
    _kill(family)
    return state, stacks


def _stacks(pid: int) -> str:
    text = before = ""
    with suppress(OSError):  # it may go on, and end, while it is asked
        file = next((fd for fd in Path(f"/proc/{pid}/fd").iterdir() if STACKS in _target(fd)), None)
        if file is None:
            return "in code that keeps no stacks at hand"
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + STACK_SECONDS
        while (not text or text != before) and time.monotonic() < end:  # it is complete once it has stopped to grow
            time.sleep(0.2)
            before, text = text, file.read_text(errors="replace")
    lines = text.splitlines()
    return "\n".join(lines[:LONGEST_REPORT]) or "in a state in which it answers no signal"


def _target(link: Path) -> str:
    with suppress(OSError):  # it was closed meanwhile
        return os.readlink(link)
    return ""


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_children() -> None:
    """Of this process, and theirs."""
    _kill(psutil.Process().children(recursive=True))


def end_family() -> NoReturn:
    """End this process, at once, and all that it has started."""
    kill_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
