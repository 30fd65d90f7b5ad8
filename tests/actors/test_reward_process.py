"""A user's function in a real process: it hangs, dies, raises, prints, and the reward goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from actors.attempts import Fault
from actors.reward_process import FunctionProcess
from tests.actors.test_attempts import rollouts

CHECKOUT = Path(__file__).parents[2]
MODULE = """
import os, re, subprocess, sys, time

calls = 0

def lengths(rollouts):
    global calls
    calls += 1
    for rollout in rollouts:
        if rollout.text == "sleep":
            time.sleep(600)
        if rollout.text == "regex":
            re.match("(a+)+b", "a" * 60)  # for longer than anyone waits, with the interpreter's lock held
        if rollout.text == "child":
            subprocess.Popen(["sleep", "600"]).wait()
        if rollout.text == "die":
            os._exit(7)
        if rollout.text == "exit":
            sys.exit("enough")
        if rollout.text == "raise":
            raise KeyError("no such thing\\nand more")
    print("printed", flush=True)
    return [len(rollout.text) + 100 * calls for rollout in rollouts]

def words(rollouts):
    return ["many" for _ in rollouts]
"""
# Enough for a process that has started; a start has 300 seconds of its own.
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("user")
    (directory / "functions_of_a_user.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield "functions_of_a_user"


@pytest.fixture(scope="module")
def function(module: str) -> Iterator[FunctionProcess]:
    process = FunctionProcess("mine", f"{module}:lengths", TIMEOUT_S)
    process.ready()
    yield process
    process.close()


def fault(call: Callable[[], object]) -> Fault:
    with pytest.raises(Fault) as caught:
        call()
    return caught.value


def ends(pid: int) -> bool:
    """The process is gone, or goes within seconds."""
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", "regex", "child"])
def test_a_function_that_hangs_is_killed_in_time_and_started_again(function: FunctionProcess, how: str) -> None:
    function(rollouts("a"))  # it is there
    before = function.process.pid
    below = psutil.Process(before)
    begin = time.monotonic()
    found = fault(lambda: function(rollouts(how)))
    assert time.monotonic() - begin < TIMEOUT_S + 5
    assert (found.kind, found.reason) == ("timeouts", "no answer within 2 seconds, so its process was killed")
    assert not below.is_running()
    assert function(rollouts("a", "bb")) == [101, 102]  # a fresh module: its first call
    assert function.process.pid != before


@pytest.mark.slow
def test_what_the_function_started_is_killed_with_it(function: FunctionProcess) -> None:
    function(rollouts("a"))
    found: list[psutil.Process] = []

    def look() -> None:
        found.extend(psutil.Process(function.process.pid).children())

    timer = threading.Timer(TIMEOUT_S / 2, look)
    timer.start()
    fault(lambda: function(rollouts("child")))
    assert len(found) == 1 and ends(found[0].pid)


@pytest.mark.slow
def test_a_process_that_ends_is_told_from_one_that_hangs(function: FunctionProcess) -> None:
    function(rollouts("a"))
    found = fault(lambda: function(rollouts("die")))
    assert (found.kind, found.reason) == ("lost", "its process ended with code 7")
    function(rollouts("a"))
    os.kill(function.process.pid, signal.SIGKILL)
    function.process.wait()
    assert function(rollouts("a")) == [101]


def test_an_exception_is_an_error_with_its_first_line_and_the_process_goes_on(function: FunctionProcess) -> None:
    function(rollouts("a"))
    before = function.process.pid
    found = fault(lambda: function(rollouts("raise")))
    assert found.kind == "errors" and found.reason.startswith("KeyError: 'no such thing")
    assert "in lengths" in found.detail and "functions_of_a_user.py" in found.detail
    assert fault(lambda: function(rollouts("exit"))).reason == "SystemExit: enough"
    assert function.process.pid == before and function(rollouts("a"))[0] > 101


def test_what_is_no_number_is_an_error(module: str) -> None:
    function = FunctionProcess("mine", f"{module}:words", TIMEOUT_S)
    function.ready()
    assert fault(lambda: function(rollouts("a"))).reason == "ValueError: could not convert string to float: 'many'"
    function.close()


def test_a_large_batch_passes(function: FunctionProcess) -> None:
    assert len(function(rollouts(*["x" * 10_000] * 300))) == 300


@pytest.mark.slow
def test_a_function_that_hangs_does_not_outlive_a_parent_that_is_killed(module: str) -> None:
    program = (
        f"from actors.reward_process import FunctionProcess; from tests.actors.test_attempts import rollouts; f = FunctionProcess('mine', '{module}:lengths', 300); "
        "f.ready(); print(f.process.pid, flush=True); f(rollouts('regex'))"
    )
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(1)  # it hangs by now
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    assert ends(pid)
