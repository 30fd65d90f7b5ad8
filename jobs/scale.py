"""Give a running PPO job more generator workers, or fewer.

    python -m jobs.scale outputs/debug generator=4

Works from any machine that sees the run's directory. The job looks between steps and while it generates: workers that
join are started beside the others and are used once they have proved the newest weights, workers that leave first
answer what they have begun. What a job that is started again begins with is placement.generator.workers.
"""

import argparse
import sys
import time
from pathlib import Path

import yaml

from minigpt_ray.cli import one_sentence
from minigpt_ray.config import PPOConfig
from minigpt_ray.scaling import Requests, refusal
from minigpt_ray.status import look_at


def main(arguments: list[str]) -> None:
    """Leave the request, and wait until the job has taken it."""
    parser = argparse.ArgumentParser(prog="python -m jobs.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="as in outputs/debug")
    parser.add_argument("size", metavar="generator=N", help="how many workers there should be")
    parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for the job to take the request; default: %(default)g")
    given = parser.parse_args(arguments)
    with one_sentence():
        workers, requests = read_size(given.size), Requests(given.run / "ppo")
        check(workers, requests.directory)
    requests.ask(workers)
    deadline = time.monotonic() + given.wait
    while not requests.is_taken and time.monotonic() < deadline:
        time.sleep(0.2)
    taken = f"the job has taken the request for {workers} generator workers"
    waits = f"the job has not taken the request yet; it does when it generates the next rollouts ({requests.path})"
    print(taken if requests.is_taken else waits)


def read_size(text: str) -> int:
    """The number in `generator=4`; raises ValueError."""
    role, _, number = text.partition("=")
    if role != "generator" or not number.isdecimal():
        raise ValueError(f"{text}: is not generator=N with a number of workers, the one role that may grow and shrink in a running job")
    return int(number)


def check(workers: int, directory: Path) -> None:
    """Raises ValueError or FileNotFoundError when no such job is running, or so many workers are not allowed."""
    if not (directory / "status.json").is_file():
        raise FileNotFoundError(f"{directory} holds no PPO run; give the directory of a run, as in outputs/debug")
    seen = look_at(directory / "status.json")
    if not seen.is_alive:
        raise ValueError(f"{seen.sentence()}; only a running job has workers that may become more or fewer")
    config = PPOConfig.model_validate(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")))
    refused = refusal(workers, config.placement.generator)
    if refused:
        raise ValueError(refused)


if __name__ == "__main__":
    main(sys.argv[1:])
