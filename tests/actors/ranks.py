"""Several ranks in processes of their own, as tests of collectives need them."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

IMPORTED = ["minigpt_ray.models", "actors.engine"]
"""What takes longest to import of what ranks need, and starts no thread, so that a process may be forked behind it."""


def run_ranks(function: Callable[..., None], args: tuple[Any, ...], world: int) -> None:
    """Call `function(rank, *args)` in so many processes and wait for them; raises when one fails.

    They are forked from one that has imported torch and transformers and done nothing else: a fork of the tests' own process
    would not survive its threads, and a fresh one imports for many seconds.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes(function, args, nprocs=world, start_method="forkserver")
