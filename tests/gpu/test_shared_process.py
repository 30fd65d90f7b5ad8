"""Learners and the frozen reference in one process on a GPU, beside a generator that sleeps meanwhile: as configs/placement/ppo_one_gpu.yaml has it."""

from pathlib import Path
from typing import Any

import pytest

from .common import ENGINE, GREEDY, PROMPTS, Cluster, Generator, Policy, PPOConfig, learn, started, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.ray]

GIB = 2**30


@pytest.mark.parametrize("offload", [True, False])
def test_learners_and_reference_share_a_process_and_leave_the_gpu_to_the_generator(ray_cluster: None, model: Path, offload: bool) -> None:
    from actors.critic import Critic
    from actors.group import gather
    from actors.placement import roles_of
    from actors.reference import Reference
    from minigpt_ray.rl.experience import RolloutBatch

    def peak(rank: Any) -> bool:
        """As a step of learning leaves the GPU: memory that was needed, and is free again."""
        import torch

        torch.empty(GIB, dtype=torch.uint8, device=rank.engine.device)
        return torch.cuda.memory_reserved() >= GIB

    def found(rank: Any) -> tuple[int, set[str], int]:
        """The process, the devices of the weights, and what torch keeps though nobody uses it, in bytes."""
        import os

        import torch

        return os.getpid(), {str(p.device) for p in rank.model.parameters()}, torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def value_step(rank: Any) -> bool:
        import torch

        def loss(module: Any, ids: Any) -> Any:
            value = (module(ids) - 1).square().mean()
            return value, {"loss": value}

        return bool(rank.engine.update([torch.arange(32, device=rank.engine.device).reshape(2, 16) + 4], loss).applied)

    learner = {"init_from": str(model), "dtype": "bfloat16", "offload_optimizer": offload}
    config = PPOConfig(
        policy=learner,
        critic=learner,
        reference={"dtype": "bfloat16"},
        generator={"dtype": "bfloat16", "sleep_between_phases": True, **ENGINE},
        weights={"transport": "cuda_ipc", "probe_tolerance": 0.2, "bucket_mib": 1},
        placement={"policy": {"gpus": 0.5}, "generator": {"gpus": 0.5}, "colocate": [["policy", "critic", "reference", "rewards"]]},
    )
    with Cluster(config.placement, roles_of(config.placement, {})) as cluster:
        groups = policy, critic, reference = Policy(cluster, config), Critic(cluster, config), Reference(cluster, config)
        for group in groups:
            group.ready()
        generator = Generator(cluster, str(model), config.generator, 64, 1, 0, 0.2)
        generator.ready()
        for version in (1, 2):
            assert all(applied for _, _, applied in learn(policy)) and critic.first(value_step).result()
            assert policy.first(peak).result()
            states = [group.first(found).result() for group in groups]
            assert len({process for process, _, _ in states}) == 1 and all(devices == {"cuda:0"} for _, devices, _ in states)
            assert max(kept for _, _, kept in states) < GIB / 16
            generator.receive(policy.publish(version))
            rollouts = generator.generate(PROMPTS, GREEDY)
            batch = RolloutBatch.of(rollouts)
            assert all(bool(part.isfinite().all()) for part in gather(policy.logprobs(batch), reference.logprobs(batch), critic.values(batch)).result())
            assert tokens(generator.generate(PROMPTS, GREEDY)) == tokens(rollouts)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_brings_back_states_that_are_in_host_memory(ray_cluster: None, model: Path, tmp_path: Path, stage: int) -> None:
    with started(model, 0.5, policy={"zero_stage": stage, "offload_optimizer": True, "optimizer": {"lr": 1e-3}}) as (policy, _):
        learn(policy)
        policy.save(tmp_path).result()
        expected = learn(policy)
        policy.load(tmp_path).result()
        assert [loss for loss, _, _ in learn(policy)] == pytest.approx([loss for loss, _, _ in expected], rel=1e-3)
