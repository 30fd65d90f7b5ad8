"""A user's reward function in a process of its own, which can be killed when it hangs: a thread cannot, and the
process of the reward sources holds torch's threads, which a fork would not survive.

    python -m actors.reward_process FD NAME FUNCTION        started by FunctionProcess, with its end of a socket
"""

import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, cast

from actors.attempts import Fault, RewardError, first_line
from actors.lineage import die_with_parent
from minigpt_ray.config import START_AGAIN_S
from minigpt_ray.rl.rollout import Rollout

logger = logging.getLogger(__name__)

START_S = 300.0
"""Seconds that a process may take to start for the first time, the imports of the function's module included."""

RewardFunction = Callable[[list[Rollout]], list[float]]


def load_function(name: str, function: str) -> RewardFunction:
    """`module:function`; raises ValueError, naming the source, when it does not exist."""
    module, _, attribute = function.partition(":")
    try:
        return cast(RewardFunction, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rewards.{name}.function={function}: {error}; name it as module:function, importable from where the job starts") from error


class FunctionProcess:
    """The function as the process of the reward sources sees it. Call it from one thread that lives on: the other
    process dies with the thread that started it."""

    def __init__(self, name: str, function: str, timeout_s: float) -> None:
        """Starts the process; `ready` waits for it."""
        self.name, self.function, self.timeout_s = name, function, timeout_s
        self._start()

    def ready(self) -> None:
        """Raises RewardError when the function does not exist or its module cannot be imported."""
        try:
            self._listen(START_S)
        except Fault as fault:
            raise RewardError(fault.reason) from None
        self._is_ready = True

    def __call__(self, rollouts: list[Rollout]) -> list[float]:
        """Raises Fault. After `timeouts` and `lost` the next call starts the process again."""
        if self.process.poll() is not None:
            logger.warning("rewards.%s: the process of its function %s; it is started again", self.name, _ended(self.process.returncode))
            self.socket.close()
            self._start()
        if not self._is_ready:
            self._listen(START_AGAIN_S)
            self._is_ready = True
        return cast(list[float], self._listen(self.timeout_s, rollouts)["scores"])

    def close(self) -> None:
        """End the process and what it has started."""
        if self.process.poll() is None:
            self._kill()
            self.process.wait()

    def _start(self) -> None:
        self._is_ready = False
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "actors.reward_process", str(theirs.fileno()), self.name, self.function],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.connection = Connection(os.dup(self.socket.fileno()))

    def _listen(self, seconds: float, rollouts: list[Rollout] | None = None) -> dict[str, Any]:
        """What the process says, to rollouts if there are any. Raises Fault; the process is dead if it said nothing."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._kill()

        timer = threading.Timer(seconds, expire)
        timer.start()
        try:
            if rollouts is not None:
                self.connection.send(rollouts)
            said = cast(dict[str, Any], json.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):
            timer.cancel()
            self._kill()
            code = self.process.wait()
            if expired.is_set():
                raise Fault("timeouts", f"no answer within {seconds:g} seconds, so its process was killed") from None
            raise Fault("lost", f"its process {_ended(code)}") from None
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set():  # it answered at the last moment
            self.process.wait()
        if "error" in said:
            raise Fault("errors", said["error"], said["traceback"])
        return said

    def _kill(self) -> None:
        """The process and its children; whoever else holds their end of the socket keeps nobody waiting."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def _ended(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


# ------------------------------------------------------------------------------------------------- the other process


def serve(connection: Connection, name: str, function: str) -> None:
    """Say that the function is there, then answer rollouts with scores until the other end is closed."""
    try:
        score = load_function(name, function)
    except Exception as error:  # whatever the user's module does
        _say(connection, {"error": str(error) if isinstance(error, ValueError) else first_line(error), "traceback": traceback.format_exc()})
        return
    _say(connection, {})
    while True:
        try:
            rollouts = connection.recv()
        except EOFError:
            return
        try:
            answer: dict[str, Any] = {"scores": [float(value) for value in score(rollouts)]}
        except (Exception, SystemExit) as error:
            answer = {"error": first_line(error), "traceback": traceback.format_exc()}
        _say(connection, answer)


def _say(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    die_with_parent()  # also when it is killed while the function hangs
    os.set_inheritable(int(sys.argv[1]), False)
    serve(Connection(int(sys.argv[1])), *sys.argv[2:])
