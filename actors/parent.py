"""The parent of a job: a light process that starts the driver, and starts it again when it dies.

    keep_running(train, load_config(PPOConfig))

A driver dies when a signal kills it (the kernel's when memory runs out) or when Ray is lost below it (a raylet, the
GCS, without which Ray ends the process itself). One that stands still, of which nothing is heard for hang_after_s, is
killed, and where it stood is said. The next one goes on from the newest checkpoint, an evaluation from
its beginning, preference pairs with the prompts that are left. What a driver ends with by itself, a refusal or an exception of the code, would come again, so it is passed on; and so is SIGTERM, after which
nothing is started any more.

The driver is a fork, made before anything heavy is imported: the parent holds the configuration and no torch. What a
driver leaves behind becomes a child of the parent, which ends it: a process of a local Ray that hangs in its end would
keep its memory for ever.
"""

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar, cast

from actors.lineage import adopt_orphans, die_with_parent, reap
from actors.stacks import examine_and_kill, keep_stacks_at_hand, kill_children
from minigpt_ray.cli import one_sentence
from minigpt_ray.config import EvaluateConfig, GeneratePreferencesConfig, PPOConfig, SupervisedConfig

C = TypeVar("C", bound=PPOConfig | SupervisedConfig | EvaluateConfig | GeneratePreferencesConfig)

RESTARTS = "MINIGPT_RAY_DRIVER_RESTARTS"
"""Environment variable that tells a driver how many were before it."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between two drivers: 1 s before the first restart, twice as long before each further one, so that a machine can come back."""
BEAT_SECONDS = 1.0
"""Between two signs of life of a driver. A thread of its own gives them, so one that only waits is let be: whatever it waits for has a limit, but for a disk and an object store."""
LEFTOVER_SECONDS = 5.0
"""How long processes that a driver leaves behind, those of a local Ray above all, may take to end by themselves."""
FURTHER = b"+"
"""A sign of life that says more than the usual one."""
_pulse: int | None = None
"""Where this process, if it is a driver, gives them."""
_ended_by = 0
"""The signal that this process, if it is a driver, ends by, once that came."""
ASKED = (signal.SIGTERM, signal.SIGINT)
"""Signals by which somebody asks a job to end."""


def keep_running(run: Callable[[C], None], config: C) -> None:
    """Exit as `run(config)` does in a process of its own, which is started anew so often as the configuration says, without a new checkpoint.

    The exit code is 128 + n when signal n ended the last driver.
    """
    parent = _Parent()
    name, limit, again, begins = _restart_rules(config)
    patience = config.hang_after_s if isinstance(config, SupervisedConfig) else config.placement.hang_after_s
    restarts = left = 0
    with parent.passing_on():
        while True:
            pid = parent.start(partial(_drive, run, config if restarts == 0 else again, restarts))
            code = parent.wait(patience)
            parent.end_what_is_left()
            left = limit if parent.got_further or restarts == 0 else left
            if parent.said_farewell() or parent.asked or -code in ASKED:
                break
            died = f"the driver (process {pid}) {f'was killed by {signal.Signals(-code).name}' if code < 0 else f'lost Ray, or a role (code {code})'}"
            if left == 0:
                print(f"{died}; {name}={limit} are used up", file=sys.stderr, flush=True)
                break
            restarts, left = restarts + 1, left - 1
            print(f"{died}; restart {limit - left} of {limit}, {begins}", file=sys.stderr, flush=True)
            parent.pause(min(2.0 ** (limit - left - 1), LONGEST_PAUSE_SECONDS))
            if parent.asked:
                break
    raise SystemExit(code if code >= 0 else 128 - code)


def _restart_rules(config: C) -> tuple[str, int, C, str]:
    """How often a job's driver may die, the name of that setting first; with which configuration the next one begins, and where, in words."""
    if isinstance(config, EvaluateConfig):
        return "restart_limit", config.restart_limit, config, "from the beginning"
    if isinstance(config, GeneratePreferencesConfig):
        return "restart_limit", config.restart_limit, config, "with the prompts that are left"
    again = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "auto"})})
    return "checkpoint.driver_restarts", config.checkpoint.driver_restarts, cast(C, again), "from the newest checkpoint"


def driver_restarts() -> int:
    """How many drivers of this job died before this one."""
    return int(os.environ.get(RESTARTS, "0"))


def got_further() -> None:
    """Tell the parent, if there is one, that there is a new checkpoint: from here on as many drivers may die as before the first one did."""
    if _pulse is not None:
        os.write(_pulse, FURTHER)


def _drive(run: Callable[[C], None], config: C, restarts: int) -> bool:
    """The life of a driver; False when Ray was lost, or a role outside of a step. Other exceptions are raised.

    That a file cannot be written, or is written by another driver too, is a sentence.
    """
    from minigpt_ray.checkpoint import CheckpointError
    from minigpt_ray.status import InUse

    os.environ[RESTARTS] = str(restarts)
    try:
        with one_sentence((CheckpointError, InUse)):
            run(config)
    except Exception as error:
        from ray.exceptions import RayError, RayTaskError

        from actors.group import RoleLost

        if not isinstance(error, RayError | RoleLost) or isinstance(error, RayTaskError):  # the last: an exception of our code on a rank
            raise
        traceback.print_exc()
        return False
    return True


def ends_by(number: int) -> None:
    """This process ends by a signal, and its exit code will say so if it is a driver: Ray's library makes another SystemExit of one that comes while it waits."""
    global _ended_by
    _ended_by = number


def _live(pulse: int) -> None:
    """Give signs of life, for ever, in a thread."""
    global _pulse
    _pulse = pulse

    def beat() -> None:
        while True:
            os.write(pulse, b".")
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()


class _Parent:
    """Who waits for the driver, and what it was asked meanwhile."""

    def __init__(self) -> None:
        adopt_orphans()
        self.asked = self.got_further = False
        self._driver: int | None = None

    def start(self, drive: Callable[[], bool]) -> int:
        """Run `drive` in a child that dies with this process; returns its process id.

        The child says farewell when it ends by itself: its exit code alone does not tell, since Ray's library ends a
        process with 1, as an exception does.
        """
        self._farewell, farewell = os.pipe()
        self._pulse, pulse = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # else one that comes now would be answered by the wrong process, or by none
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(self._farewell)
            os.close(self._pulse)
            if os.getppid() != parent:  # it died before the child could say that it wants to follow
                os._exit(128 + signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
            keep_stacks_at_hand()
            _live(pulse)
            try:
                if not drive():
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(1)  # at a usual exit Ray would wait for what is not there any more
            except BaseException as end:
                os.write(farewell, b"!")
                if isinstance(end, SystemExit) and _ended_by:
                    raise SystemExit(128 + _ended_by) from None
                raise
            os.write(farewell, b".")
            raise SystemExit(0)
        os.close(farewell)
        os.close(pulse)
        self._driver = pid
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        return pid

    def wait(self, patience: float) -> int:
        """Exit code of the driver, -n when signal n ended it. When it gives no sign of life for `patience` seconds, it is killed."""
        assert self._driver is not None
        silent, seen, self.got_further = 0.0, time.monotonic(), False
        while self._driver not in (ended := reap() or {}):
            heard = os.read(self._pulse, 1024) if select.select([self._pulse], [], [], BEAT_SECONDS)[0] else None
            self.got_further |= FURTHER in (heard or b"")
            before, seen = seen, time.monotonic()
            silent = 0.0 if heard else silent + min(seen - before, 2 * BEAT_SECONDS)  # no longer: this process may have been stopped too
            if heard == b"":  # it is about to end: nobody holds the other end any more
                time.sleep(0.01)
            if silent > patience:
                state, stacks = examine_and_kill(self._driver)
                what = f"the driver (process {self._driver}, {state}) gave no sign of life for {patience:.0f} s and counts as dead; it was"
                print(f"{what}\n{stacks}", file=sys.stderr, flush=True)
                silent = 0.0
        while select.select([self._pulse], [], [], 0)[0] and (heard := os.read(self._pulse, 1024)):  # its last words
            self.got_further |= FURTHER in heard
        os.close(self._pulse)
        status, self._driver = ended[self._driver], None
        return os.waitstatus_to_exitcode(status)

    def end_what_is_left(self) -> None:
        """Return when nothing that the driver has started is alive: by itself, or killed."""
        if self._children_after(LEFTOVER_SECONDS):
            kill_children()
            self._children_after(LEFTOVER_SECONDS)

    def _children_after(self, seconds: float) -> bool:
        """Whether there are some; returns as soon as there are none."""
        end = time.monotonic() + seconds
        while (left := reap() is not None) and time.monotonic() < end:
            time.sleep(0.02)
        return left

    def said_farewell(self) -> bool:
        """Whether the driver ended by itself."""
        os.set_blocking(self._farewell, False)  # a process that the driver left behind may hold the other end
        try:
            return bool(os.read(self._farewell, 1))
        except BlockingIOError:
            return False
        finally:
            os.close(self._farewell)

    def pause(self, seconds: float) -> None:
        """Wait, but not when asked to end."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.1)

    @contextmanager
    def passing_on(self) -> Iterator[None]:
        """SIGTERM goes to the driver, which saves and ends; so does Ctrl-C, which a terminal sends to both."""

        def terminate(number: int, frame: object) -> None:
            self.asked = True
            if self._driver is not None:
                with suppress(ProcessLookupError):  # it ended in this moment
                    os.kill(self._driver, signal.SIGTERM)

        def interrupt(number: int, frame: object) -> None:
            self.asked = True

        handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminate), signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
