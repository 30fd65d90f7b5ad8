"""A prompt that kills every engine that is asked for an answer to it, in a PPO job as a user starts it."""

import math
import re
from pathlib import Path

import pytest

from minigpt_ray.tracking import read_samples
from tests.jobs.runs import LOWER_CASE, ONE_PROCESS, ppo
from tests.jobs.starts import random_start

DEADLY = """
import importlib.util, os, sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "actors.generator_worker":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            self.execute, spec.loader.exec_module = spec.loader.exec_module, self.exec_module
            return spec

    def exec_module(self, module):
        self.execute(module)
        work = module.GeneratorWorker.work

        def dies(worker, orders, *rest):
            if 43 in {order.number for order in orders}:
                os.kill(os.getpid(), 9)
            return work(worker, orders, *rest)

        module.GeneratorWorker.work = dies


sys.meta_path.insert(0, Finder())
"""
"""sitecustomize.py of a generator worker that nothing survives of when it is asked for the fourth prompt of step 1."""


@pytest.mark.slow
def test_a_prompt_of_which_engines_die_is_named_and_nothing_is_learnt_from_it(tmp_path: Path) -> None:
    random_start(tmp_path, "deadly")
    (tmp_path / "a_users_rewards.py").write_text(LOWER_CASE)
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    run = ppo(tmp_path, "deadly", ONE_PROCESS, "generator.backend=transformers", "generator.restart_limit=1", "logging.samples_per_step=16", "steps=1")
    begins = [row["prompt"][:80] for row in read_samples(run.directory / "samples.jsonl") if row["finish_reason"] == "failed"]
    assert len(begins) == 2 and len(set(begins)) == 1  # its two samples
    said = re.findall(r"generator workers die of a prompt of \w+, \d+ tokens, that begins with '(.*)'; it gets no answers", run.output)
    assert said == begins[:1]
    (row,) = run.rows
    assert (row["rollouts/dropped"], row["rollouts/valid"], row["reward/failed"]) == (2, 14, 2)
    assert (row["pool/generator/fatal_prompts"], row["restarts/generator"]) == (1, 3)
    assert all(math.isfinite(value) for value in row.values())
