"""Jobs on a cluster of three hosts, submitted from outside: PPO with learners on two of them and the generator on the third, hosts that are lost or
cut off, and every stage of a pipeline."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import Hosts, cluster
from tests.jobs.runs import LOWER_CASE, Finished, assert_same, metrics_so_far, ppo
from tests.jobs.starts import random_start

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TWO_RANKS = ("placement.policy.ranks=2", "placement.critic.ranks=2", "logging.batches=8", "evaluation.num_prompts=4", "checkpoint.every=2")
SPREAD = (
    "placement.strategy=spread",
    *(f"placement.{role}.labels.role=learner" for role in ("policy", "critic", "reference")),
    "placement.generator.labels.role=generator",
    "placement.wait_seconds=60",
)


SMALL = ("documents.sources.palindromes.count=200", "documents.sources.words.count=100", "demonstrations.sources.spelling.count=100")
TWO_HOSTS = ("num_workers=2", "cpus_per_worker=4")
"""Two workers of this size do not fit on one host."""
PAIRS = ("pairs_from=generate_preferences", "steps=6")
LIFE = {
    "prepare_data": ("configs/data/spelling.yaml", *SMALL, "prompts.sources.spelling.count=60", "held_out=0.1"),
    "pretrain": ("configs/debug/pretrain.yaml", "steps=10", *TWO_HOSTS),
    "midtrain": ("configs/debug/midtrain.yaml", "steps=6", "labels_per_worker={role: generator}"),
    "sft": ("configs/debug/sft.yaml", "model={init_from: midtrain}", "steps=10", *TWO_HOSTS),
    "generate_preferences": ("configs/debug/generate_preferences.yaml", "num_prompts=12"),
    "reward_model": ("configs/debug/reward_model.yaml", *PAIRS),
    "dpo": ("configs/debug/dpo.yaml", *PAIRS),
    "ppo": ("configs/debug/ppo.yaml", "policy.init_from=dpo", "rewards.learnt={kind: model, init_from: reward_model}", "steps=2", *SPREAD[:-1]),
    "evaluate": ("configs/debug/evaluate.yaml", "models=[sft, dpo, ppo]"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all hosts see."""
    directory = tmp_path_factory.mktemp("shared")
    random_start(directory, "alone", "apart", "driverless", "lost", "headless", "cut")
    (directory / "a_users_rewards.py").write_text(LOWER_CASE)
    return directory


@pytest.fixture(scope="module")
def alone(home: Path) -> Finished:
    """The run on one host that the others are held against."""
    return ppo(home, "alone", *TWO_RANKS, "steps=8")


@pytest.fixture(scope="module")
def hosts(home: Path) -> Iterator[Hosts]:
    """The head and another one for learners, and one for the generator."""
    roles = {"mgr-head": "role=learner", "mgr-learner": "role=learner", "mgr-generator": "role=generator"}
    with cluster(home, roles, cpus=6) as found:
        yield found


class Submitted:
    """A job on the cluster."""

    def __init__(self, hosts: Hosts, home: Path, run: str, job: str, *arguments: str) -> None:
        self.hosts, self.directory = hosts, home / run / job
        self.name = f"{run}-{time.time_ns()}"
        hosts.submit(self.name, home, "python", "-m", f"jobs.{job}", *arguments, f"output_dir={home}", f"run={run}")

    @property
    def output(self) -> str:
        return self.hosts.log(self.name)

    @property
    def status(self) -> str:
        return self.hosts.status(self.name)

    def wait_for(self, happened: Callable[[], bool], every: float = 0.05, seconds: float = 400) -> None:
        """Look every so many seconds whether it has; a step may take less than one."""
        begin = looked = time.monotonic()
        while not happened():
            if time.monotonic() - looked > 2:
                looked = time.monotonic()
                assert self.status in ("PENDING", "RUNNING", "SUCCEEDED", "") and looked - begin < seconds, self.output[-5000:]
            time.sleep(every)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(row["step"] >= step and "train/epoch" in row for row in metrics_so_far(self.directory)))

    def finish(self, seconds: float = 400) -> Finished:
        self.wait_for(lambda: self.status == "SUCCEEDED", 1, seconds)
        return Finished(self.directory, self.output)

    @property
    def _processes(self) -> dict[str, Any]:
        return json.loads((self.directory / "processes.json").read_text())

    @property
    def driver(self) -> int:
        """Its process."""
        return self._processes["driver"]

    def places(self, role: str) -> list[str]:
        """Hosts of a role's processes."""
        return [place["host"] for place in self._processes["roles"][role]]


def submit_ppo(hosts: Hosts, home: Path, run: str) -> Submitted:
    """PPO with two ranks of each learner and a reward function of the user's."""
    reward = ("rewards.letters.kind=function", "rewards.letters.function=a_users_rewards:lower_case")
    return Submitted(hosts, home, run, "ppo", "configs/debug/ppo.yaml", "steps=8", *reward, *TWO_RANKS, *SPREAD)


def test_learners_on_two_hosts_and_a_generator_on_a_third_have_the_numbers_of_one_host(alone: Finished, hosts: Hosts, home: Path) -> None:
    job = submit_ppo(hosts, home, "apart")
    run = job.finish()
    if hosts.isolated:
        assert set(job.places("policy")) == set(job.places("critic")) == {hosts["mgr-head"].address, hosts["mgr-learner"].address}
        assert job.places("generator") == [hosts["mgr-generator"].address]
    assert_same(run, alone)


def test_the_driver_of_a_submitted_job_is_killed_and_another_one_finds_its_room(alone: Finished, hosts: Hosts, home: Path) -> None:
    job = submit_ppo(hosts, home, "driverless")
    job.wait_for_step(3)
    os.kill(job.driver, signal.SIGKILL)
    run = job.finish()
    assert re.search(r"the driver \(process \d+\) was killed by SIGKILL; restart 1 of \d+, from the newest checkpoint", run.output)
    assert re.search(r"PPO goes on after step \d", run.output)
    assert_same(run, alone)


def test_the_host_of_the_generator_is_lost_and_comes_back(alone: Finished, hosts: Hosts, home: Path) -> None:
    """Nothing else has its label, so the job waits for it."""
    job = submit_ppo(hosts, home, "lost")
    job.wait_for_step(3)
    hosts["mgr-generator"].lose()
    time.sleep(5)
    hosts["mgr-generator"].switch_on()
    hosts.start(hosts["mgr-generator"])
    run = job.finish()
    assert re.search(r"generator worker \d+ \(process \d+ on [\d.]+\) died; a new one takes its place", run.output), run.output[-5000:]
    assert_same(run, alone)


def test_the_head_is_lost_and_the_same_command_given_again(alone: Finished, hosts: Hosts, home: Path) -> None:
    """The job dies with the host that its driver is on; what is left of the cluster ends by itself."""
    submit_ppo(hosts, home, "headless").wait_for_step(3)
    hosts["mgr-head"].lose()
    hosts.start_again()
    run = submit_ppo(hosts, home, "headless").finish()
    assert re.search(r"PPO goes on after step \d", run.output)
    assert_same(run, alone)


def test_a_host_with_learners_is_cut_off(alone: Finished, hosts: Hosts, home: Path) -> None:
    """The learners start again where they still can, from the newest checkpoint."""
    if not hosts.isolated:
        pytest.skip("a host that shares this machine's network cannot be cut off")
    job = submit_ppo(hosts, home, "cut")
    job.wait_for_step(3)
    hosts["mgr-learner"].cut_off()
    run = job.finish()
    assert re.search(r"(policy|critic).* died; the learners start again and go on after step \d", run.output)
    assert set(job.places("policy")) == {hosts["mgr-head"].address}
    assert_same(run, alone)


@pytest.mark.timeout(1000)
def test_every_stage_of_a_pipeline_is_submitted_at_once(hosts: Hosts, home: Path) -> None:
    """Workers of pretrain and SFT are on two hosts."""
    stages = {name: {"files": [words[0]], "overrides": list(words[1:])} for name, words in LIFE.items()}
    (home / "life.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    run = Submitted(hosts, home, "life", "pipeline", str(home / "life.yaml")).finish(seconds=900)
    for number, name in enumerate(LIFE, 1):
        assert f"{name} ({number} of {len(LIFE)})" in run.output
    for name in ("pretrain", "midtrain", "sft", "reward_model", "dpo", "ppo"):
        assert (home / "life" / name / "model" / "model.safetensors").is_file(), name
    assert all(len(re.findall(f"{name} starts: .* {workers} workers", run.output)) == 1 for name, workers in (("pretrain", 2), ("midtrain", 1), ("sft", 2)))
    assert json.loads((home / "life" / "pipeline.json").read_text()).keys() == LIFE.keys()
