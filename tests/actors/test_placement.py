"""Roles have processes of their own or share them; processes are started where they were reserved, which is given back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from actors.placement import Cluster, environment, peak_flops, roles_of, roles_of_evaluation
from actors.rank_host import RankHost
from minigpt_ray.config import FunctionReward, GeneratorPlacement, ModelReward, PlacementConfig, RolePlacement, VerifierReward

MODEL = ModelReward(init_from="reward_model")
REWARDS = {"verifier": VerifierReward(), "a": MODEL, "function": FunctionReward(function="module:function"), "b": MODEL}


def test_every_model_has_its_role_and_functions_share_one() -> None:
    placement = PlacementConfig(generator=GeneratorPlacement(workers=3), reward_model=RolePlacement(cpus=2))
    roles = roles_of(placement, REWARDS)
    assert list(roles) == ["generator", "policy", "critic", "reference", "rewards", "reward_model_0", "reward_model_1"]
    assert roles["generator"].ranks == 3 and roles["reward_model_1"].cpus == 2
    assert list(roles_of(placement, {}, critic=False)) == ["generator", "policy", "reference", "rewards"]
    assert list(roles_of_evaluation(placement, REWARDS)) == ["generator", "rewards", "reward_model_0", "reward_model_1"]


def test_roles_that_live_with_another_ask_for_nothing() -> None:
    placement = PlacementConfig(colocate=(("policy", "reference", "reward_model"), ("critic", "rewards")))
    assert list(roles_of(placement, REWARDS)) == ["generator", "policy", "critic"]
    assert [placement.home(role) for role in ("generator", "reference", "reward_model_1", "rewards", "critic")] == [
        "generator",
        "policy",
        "policy",
        "critic",
        "critic",
    ]


@pytest.mark.parametrize(
    ("colocate", "sentence"),
    [
        ([["policy", "generator"]], "colocate names 'generator'; use some of policy, critic, reference, reward_model, rewards"),
        ([["policy", "critic"], ["reference", "critic"]], "colocate names critic twice; a role lives in one place"),
        ([["rewards", "reward_model"]], r"its first role gives the processes and must be policy, critic or reference"),
        ([["policy", "critic"]], "colocate puts critic with 1 ranks into the processes of policy with 2; give both the same number"),
    ],
)
def test_sets_that_cannot_share_processes_are_refused(colocate: list[list[str]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PlacementConfig.model_validate({"policy": {"ranks": 2}, "colocate": colocate})


def test_ranks_with_a_part_of_a_gpu_need_a_worker_each_to_share_it_with() -> None:
    part = {"ranks": 2, "gpus": 0.6}
    with pytest.raises(
        ValueError, match=r"policy\.ranks=2 with policy\.gpus=0\.6 may meet on one GPU, .* or let every policy rank share a GPU with a generator worker"
    ):
        PlacementConfig.model_validate({"policy": part})
    shared = {"policy": part, "generator": {"workers": 2, "gpus": 0.4}}
    assert PlacementConfig.model_validate(shared).pairs
    with pytest.raises(ValueError, match=r"critic\.ranks=2 with critic\.gpus=0\.6 may meet on one GPU"):
        PlacementConfig.model_validate(shared | {"critic": part})
    assert PlacementConfig.model_validate(shared | {"critic": part, "colocate": [["policy", "critic"]]}).pairs
    assert not PlacementConfig().pairs


def test_what_asks_for_other_nodes_than_the_policy_shares_no_gpu_with_it() -> None:
    policy = {"gpus": 0.6, "labels": {"role": "learner"}, "resources": {"learner": 1}}
    for generator, shares in (
        ({}, True),
        ({"labels": policy["labels"]}, True),
        ({"labels": {"role": "generator"}}, False),
        ({"resources": {"generator": 1}}, False),
    ):
        assert PlacementConfig.model_validate({"policy": policy, "generator": {"gpus": 0.4, **generator}}).pairs == shares


def test_what_is_asked_for_a_role_without_processes_of_its_own_is_refused() -> None:
    shared = {"colocate": [["policy", "critic"]]}
    with pytest.raises(ValueError, match=r"critic\.gpus=1\.0 has no effect, since colocate puts critic into the processes of policy; set policy\.gpus"):
        PlacementConfig.model_validate(shared | {"critic": {"gpus": 1}})
    PlacementConfig.model_validate(shared | {"policy": {"gpus": 1}, "critic": {"gpus": 1}})
    assert PlacementConfig.model_validate(PlacementConfig.model_validate(shared | {"policy": {"gpus": 1}}).model_dump())


@pytest.mark.ray
def test_roles_of_a_set_get_the_same_processes_which_join_one_group_once(ray_cluster: None) -> None:
    placement = PlacementConfig(colocate=(("reference", "policy", "rewards"),))
    with Cluster(placement, roles_of(placement, {})) as cluster:
        policy = cluster.hosts("policy")
        assert len(cluster.form_group("policy")) == 1
        assert cluster.hosts("reference") == cluster.hosts("rewards") == policy
        assert not cluster.form_group("reference")  # which is formed
        cluster.grant("rewards", 5000)  # whose calls the others in these processes wait for
        assert [cluster.patience(role) for role in ("policy", "rewards", "critic")] == [5000, 5000, placement.hang_after_s]
        critic = cluster.hosts("critic")
        pids = [ray.get(hosts[0].__ray_call__.remote(lambda _: os.getpid())) for hosts in (policy, critic)]
        assert pids[0] != pids[1]
        ray.kill(critic[0])
        assert cluster.hosts("critic") != critic


def test_what_the_driver_knows_of_hub_and_network_is_passed_on_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "MALLOC_ARENA_MAX", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "x")
    assert {"HF_HOME", "MALLOC_ARENA_MAX", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME"} == {name for name, value in environment(1)["env_vars"].items() if value == "x"}


def test_a_process_gets_as_many_threads_as_it_was_promised() -> None:
    variables = environment(3)["env_vars"]
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"


def wait_until_free(cpus: float) -> None:
    """Until so many CPUs are reserved by nobody."""
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < cpus and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == cpus


def test_generators_on_gpus_count_though_the_policy_has_none() -> None:
    roles = {"generator": GeneratorPlacement(workers=2, gpus=1), "policy": RolePlacement()}
    assert peak_flops(roles, ["cpu", "NVIDIA L4", "NVIDIA L4"]) == 2 * 121e12


@pytest.mark.ray
def test_processes_run_in_their_reservation_which_is_given_back(ray_cluster: None) -> None:
    before = ray.cluster_resources()["CPU"]
    wait_until_free(before)  # earlier tests give back what they had
    with Cluster(PlacementConfig(), {"policy": RolePlacement(ranks=2, cpus=1)}) as cluster:
        hosts = cluster.hosts("policy")
        ranks = ray.get([host.__ray_call__.remote(lambda self: self.rank) for host in hosts])
        assert [(rank.index, rank.world) for rank in ranks] == [(0, 2), (1, 2)]
        assert isinstance(ray.get(hosts[0].__ray_call__.remote(lambda self: self)), RankHost)
        assert ray.available_resources()["CPU"] == before - 2
        assert peak_flops(cluster.roles, ["cpu", "cpu"]) > 1e8
    wait_until_free(before)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(hosts[0].address.remote())


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_once_ray_is_there_is_that_of_any_process_and_nothing_is_printed() -> None:
    program = "import os, signal, time; from actors.placement import connect; connect(None, cpus=1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
