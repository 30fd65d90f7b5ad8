"""What the cluster cannot hold is refused with a table; what it holds is started where it was reserved and given back."""

import os
import time

import pytest
import ray

from actors import placement
from actors.group import RankHost
from actors.placement import Cluster, PlacementError, environment, peak_flops, preflight, roles_of, roles_of_evaluation
from minigpt_ray.config import FunctionReward, GeneratorPlacement, ModelReward, PlacementConfig, RolePlacement, VerifierReward

MODEL = ModelReward(init_from="reward_model")
REWARDS = {"verifier": VerifierReward(), "a": MODEL, "function": FunctionReward(function="module:function"), "b": MODEL}


def test_every_model_has_its_role_and_functions_share_one() -> None:
    placement = PlacementConfig(generator=GeneratorPlacement(ranks=3), reward_model=RolePlacement(cpus=2))
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


@pytest.mark.ray
def test_roles_of_a_set_get_the_same_processes_which_join_one_group_once(ray_cluster: None) -> None:
    placement = PlacementConfig(colocate=(("reference", "policy", "rewards"),))
    with Cluster(placement, roles_of(placement, {})) as cluster:
        policy = cluster.hosts("policy", form_group=True)
        assert cluster.hosts("reference", form_group=False) == cluster.hosts("rewards", form_group=False) == policy
        critic = cluster.hosts("critic", form_group=True)
        pids = [ray.get(hosts[0].__ray_call__.remote(lambda _: os.getpid())) for hosts in (policy, critic)]
        assert pids[0] != pids[1]
        ray.kill(critic[0])
        assert cluster.hosts("critic", form_group=True) != critic


def test_a_process_gets_as_many_threads_as_it_was_promised() -> None:
    variables = environment(3)["env_vars"]
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"


@pytest.mark.ray
def test_what_the_cluster_cannot_hold_is_refused_within_seconds_with_a_table(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PREFLIGHT_SECONDS", 1.0)
    roles = {"policy": RolePlacement(ranks=4, cpus=50, gpus=1), "critic": RolePlacement()}
    start = time.monotonic()
    with pytest.raises(PlacementError) as refusal:
        Cluster(PlacementConfig(), roles)
    assert 1 < time.monotonic() - start < 15
    sentence, policy, critic = str(refusal.value).splitlines()
    free = ray.available_resources()["CPU"]
    assert sentence == (
        f"the cluster cannot hold this job: 201 CPU asked and {free:g} free, 4 GPU asked and 0 free; ask for less under `placement` or add nodes"
    )
    assert policy.split() == ["policy", "4", "x", "50", "CPU,", "1", "GPU"]
    assert critic.split() == ["critic", "1", "x", "1", "CPU,", "0", "GPU"]


@pytest.mark.ray
def test_what_fits_passes_at_once(ray_cluster: None) -> None:
    start = time.monotonic()
    preflight({"policy": RolePlacement(ranks=2), "critic": RolePlacement()}, own=False)
    assert time.monotonic() - start < 1


@pytest.mark.ray
def test_in_a_cluster_of_its_own_a_job_does_not_wait_for_what_will_never_be_free(ray_cluster: None) -> None:
    start = time.monotonic()
    with pytest.raises(PlacementError, match="the cluster cannot hold this job: 99 CPU asked"):
        preflight({"policy": RolePlacement(cpus=99)}, own=True)
    assert time.monotonic() - start < placement.PREFLIGHT_SECONDS


@pytest.mark.ray
def test_processes_run_in_their_reservation_which_is_given_back(ray_cluster: None) -> None:
    before = ray.available_resources()["CPU"]
    with Cluster(PlacementConfig(), {"policy": RolePlacement(ranks=2, cpus=1)}) as cluster:
        hosts = cluster.hosts("policy", form_group=False)
        ranks = ray.get([host.__ray_call__.remote(lambda self: self.rank) for host in hosts])
        assert [(rank.index, rank.world) for rank in ranks] == [(0, 2), (1, 2)]
        assert isinstance(ray.get(hosts[0].__ray_call__.remote(lambda self: self)), RankHost)
        assert ray.available_resources()["CPU"] == before - 2
        assert peak_flops(cluster.roles, ray.get(hosts[0].device_name.remote())) > 1e8
    deadline = time.monotonic() + 20
    while ray.available_resources()["CPU"] < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == before
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(hosts[0].address.remote())
