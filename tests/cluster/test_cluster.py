"""PPO on a cluster of three hosts: submitted from outside, learners on two of them, the generator on the third; hosts that are lost, or cut off."""

import json
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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
        if not found.isolated:
            warnings.warn("network namespaces are not permitted here; the nodes of the cluster share this machine's address", stacklevel=1)
        yield found


class Submitted:
    """A job on the cluster."""

    def __init__(self, hosts: Hosts, home: Path, run: str, steps: int) -> None:
        self.hosts, self.run, self.directory = hosts, run, home / run / "ppo"
        reward = ("rewards.letters.kind=function", "rewards.letters.function=a_users_rewards:lower_case")
        variables = json.dumps({"env_vars": {"PYTHONPATH": str(home)}})
        overrides = (f"output_dir={home}", f"run={run}", f"steps={steps}", *reward, *TWO_RANKS, *SPREAD)
        job = ("--working-dir", ".", f"--runtime-env-json={variables}", "--no-wait", f"--submission-id={run}-{time.time_ns()}")
        done = hosts.ray("job", "submit", "--address", hosts.dashboard, *job, "--", "python", "-m", "jobs.ppo", "configs/debug/ppo.yaml", *overrides)
        assert done.returncode == 0, done.stdout
        self.name = job[-1].split("=")[1]

    @property
    def output(self) -> str:
        return self.hosts.ray("job", "logs", "--address", self.hosts.dashboard, self.name).stdout

    @property
    def status(self) -> str:
        said = self.hosts.ray("job", "status", "--address", self.hosts.dashboard, self.name).stdout
        return re.findall(r"(PENDING|RUNNING|SUCCEEDED|FAILED|STOPPED|succeeded|failed)", said)[-1].upper()

    def wait_for(self, happened: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        looked = time.monotonic()
        while not happened():
            if time.monotonic() - looked > 60:  # seldom: to ask takes as long as some steps
                looked = time.monotonic()
                assert self.status in ("PENDING", "RUNNING", "SUCCEEDED") and looked < deadline, self.output[-5000:]
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(row["step"] >= step and "train/epoch" in row for row in metrics_so_far(self.directory)))

    def finish(self) -> Finished:
        self.wait_for(lambda: self.status == "SUCCEEDED")
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


def test_learners_on_two_hosts_and_a_generator_on_a_third_have_the_numbers_of_one_host(alone: Finished, hosts: Hosts, home: Path) -> None:
    job = Submitted(hosts, home, "apart", steps=8)
    run = job.finish()
    if hosts.isolated:
        assert set(job.places("policy")) == set(job.places("critic")) == {hosts["mgr-head"].address, hosts["mgr-learner"].address}
        assert job.places("generator") == [hosts["mgr-generator"].address]
    assert_same(run, alone)


def test_the_driver_of_a_submitted_job_is_killed_and_another_one_finds_its_room(alone: Finished, hosts: Hosts, home: Path) -> None:
    job = Submitted(hosts, home, "driverless", steps=8)
    job.wait_for_step(3)
    os.kill(job.driver, signal.SIGKILL)
    run = job.finish()
    assert re.search(r"the driver \(process \d+\) was killed by SIGKILL; restart 1 of \d+, from the newest checkpoint", run.output)
    assert re.search(r"PPO goes on after step \d", run.output)
    assert_same(run, alone)


def test_the_host_of_the_generator_is_lost_and_comes_back(alone: Finished, hosts: Hosts, home: Path) -> None:
    """Nothing else has its label, so the job waits for it."""
    job = Submitted(hosts, home, "lost", steps=8)
    job.wait_for_step(3)
    hosts["mgr-generator"].lose()
    time.sleep(5)
    hosts.start(hosts["mgr-generator"])
    run = job.finish()
    assert re.search(r"generator worker \d+ \(process \d+ on [\d.]+\) died; a new one takes its place", run.output)
    assert_same(run, alone)


def test_the_head_is_lost_and_the_same_command_given_again(alone: Finished, hosts: Hosts, home: Path) -> None:
    """The job dies with the host that its driver is on; what is left of the cluster ends by itself."""
    Submitted(hosts, home, "headless", steps=8).wait_for_step(3)
    hosts["mgr-head"].lose()
    hosts.start_again()
    run = Submitted(hosts, home, "headless", steps=8).finish()
    assert re.search(r"PPO goes on after step \d", run.output)
    assert_same(run, alone)


def test_a_host_with_learners_is_cut_off(alone: Finished, hosts: Hosts, home: Path) -> None:
    """The learners start again where they still can, from the newest checkpoint."""
    if not hosts.isolated:
        pytest.skip("a host that shares this machine's network cannot be cut off")
    job = Submitted(hosts, home, "cut", steps=8)
    job.wait_for_step(3)
    hosts["mgr-learner"].cut_off()
    run = job.finish()
    assert re.search(r"(policy|critic).* died; the learners start again and go on after step \d", run.output)
    assert set(job.places("policy")) == {hosts["mgr-head"].address}
    assert_same(run, alone)
