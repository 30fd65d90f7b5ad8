"""A process that hangs, or is stopped, tells where it is before it is killed with its children."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.stacks import examine_and_kill

CHECKOUT = Path(__file__).parents[2]

HANGS = """
import subprocess, threading
from actors.stacks import keep_stacks_at_hand
keep_stacks_at_hand()
child = subprocess.Popen(["sleep", "100"])
def waits_for_ever():
    print(child.pid, flush=True)
    threading.Event().wait({seconds})
waits_for_ever()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_its_state_and_stack_are_found_and_its_family_is_killed(stopped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS.format(seconds=100)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        if stopped:
            process.send_signal(signal.SIGSTOP)
        expected = psutil.STATUS_STOPPED if stopped else psutil.STATUS_SLEEPING
        while psutil.Process(process.pid).status() != expected:
            pass
        state, stacks = examine_and_kill(process.pid)
        assert state == expected
        assert "in waits_for_ever" in stacks and "most recent call first" in stacks
        assert process.wait(timeout=10) == -signal.SIGKILL
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_one_that_keeps_no_stacks_and_one_that_is_gone_are_said_to_be_so() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
            pass
        assert examine_and_kill(process.pid) == ("sleeping", "in code that keeps no stacks at hand")
        process.wait(timeout=10)
    assert examine_and_kill(process.pid) == ("gone", "")
