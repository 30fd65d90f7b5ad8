"""What stands between the workers of a supervised stage and its driver: messages, the mailbox, and where a worker begins.

Ray's and Ray Train's own processes read this module, so it imports nothing that takes long.
"""

import asyncio
import math
import pickle
import time
from dataclasses import dataclass
from typing import Any

import ray

from minigpt_ray.imports import without_collection

SIGN_SECONDS = 5.0
"""Between two signs of life of a worker."""


@dataclass(frozen=True)
class Started:
    """A worker's process is there, and has not read anything yet."""

    name: str
    place: Any
    """Whereabouts, for the watchdog."""
    process: dict[str, Any]
    """Rank, host, pid and device, for processes.json."""


@dataclass(frozen=True)
class Alive:
    """A worker computes what comes before the first step."""


@dataclass(frozen=True)
class Begun:
    """The workers are ready, for the first time or because others were lost; the next row is of step + 1."""

    step: int


@dataclass(frozen=True)
class Logged:
    """The rows of metrics of a step."""

    step: int
    rows: list[dict[str, float]]


@dataclass(frozen=True)
class Saving:
    """A checkpoint of the steps so far is about to be written."""


@dataclass(frozen=True)
class Stopped:
    """No more rows; `fault` says why, or is empty when all steps were taken."""

    fault: str
    asked: bool = False
    """The driver asked for it; the last step is saved, and there is no model yet."""
    early: str = ""
    """What is to be said of a run that has stopped before its last step by itself; its model is there."""


class Mailbox:
    """Ray actor between the workers and the driver, which knows what the driver has dealt with."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._asked_to_end = self._has_fault = False

    async def put(self, message: Any) -> bool:
        """Whether the driver has asked to end."""
        self._has_fault |= isinstance(message, Stopped) and message.fault != ""
        await self._queue.put(message)
        return self._asked_to_end

    async def ask_to_end(self) -> None:
        self._asked_to_end = True

    async def has_fault(self) -> bool:
        """Whether a worker has said what ends the run."""
        return self._has_fault

    async def take(self, done: int) -> list[Any]:
        """The next messages, at least one; `done` is how many of those given out before have been dealt with."""
        for _ in range(done):
            self._queue.task_done()
        messages = [await self._queue.get()]
        while not self._queue.empty():
            messages.append(self._queue.get_nowait())
        return messages

    async def settled(self) -> None:
        """Returns once the driver has dealt with everything that was put."""
        await self._queue.join()


class Sender:
    """Rank 0's end of the mailbox. A message waits for the one before it, since calls to an async actor may overtake each other."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._before = mailbox, mailbox.put.remote(None)

    def asked_to_end(self) -> bool:
        """Whether the driver has asked to end, as of the last message."""
        return bool(ray.get(self._before))

    def send(self, message: Any) -> None:
        ray.get(self._before)
        self._before = self._mailbox.put.remote(message)

    def stop(self, message: Stopped) -> None:
        """Send the last message; returns once it is in the mailbox."""
        self.send(message)
        ray.get(self._before)

    def settle(self) -> None:
        """Returns once the driver has dealt with everything that was sent, and the disk holds it."""
        self.send(Saving())
        ray.get(self._before)
        ray.get(self._mailbox.settled.remote())


class Pulse:
    """Any rank's signs of life while it is at work for long before the first step: one for so many calls as come within SIGN_SECONDS."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last = mailbox, -math.inf

    def __call__(self) -> None:
        if time.monotonic() >= self._last + SIGN_SECONDS:
            self._last = time.monotonic()
            self._mailbox.put.remote(Alive())


def work(given: dict[str, Any]) -> None:
    """What every Ray Train worker runs. What it is given is pickled, since Ray Train's controller reads it on the way."""
    if ray.get(given["mailbox"].has_fault.remote()):  # it is in the place of one that could not go on, and new ones would not either
        return
    with without_collection():
        from actors.supervised_rank import train

    ready, stored = pickle.loads(given["ready_and_stored"])
    train(ready, stored, given["mailbox"])
