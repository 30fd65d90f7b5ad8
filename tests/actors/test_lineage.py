"""Processes that do not outlive the one that started them."""

import subprocess
import sys
import time

import psutil

from actors.lineage import end_descendants

WAITS = "import sys; sys.stdin.read()"
STARTS_ANOTHER = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {WAITS!r}, 'the-' + 'unwanted']); print(child.wait(), flush=True)"


def test_those_with_the_title_end_and_the_others_do_not() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS_ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        with subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE) as other:
            while not _grandchild_is_there(parent.pid):
                time.sleep(0.05)
            end_descendants("the-unwanted")
            assert parent.stdout is not None and parent.stdout.readline() == "-9\n" and parent.wait(10) == 0
            assert other.poll() is None
            other.kill()


def _grandchild_is_there(pid: int) -> bool:
    return any("the-unwanted" in child.cmdline() for child in psutil.Process(pid).children())
