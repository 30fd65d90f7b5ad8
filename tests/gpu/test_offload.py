"""Optimizer states in host memory between updates: the same steps, less memory on the GPU."""

from pathlib import Path
from typing import Any

import pytest

from .common import learn, started

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_steps_are_the_same_with_states_in_host_memory(ray_cluster: None, model: Path, stage: int, dtype: str) -> None:
    courses = []
    for offload in (False, True):
        with started(model, 0.5, dtype=dtype, policy={"zero_stage": stage, "offload_optimizer": offload}) as (policy, generator):
            courses.append(learn(policy))
            generator.receive(policy.publish(1))
    for (loss, norm, applied), (other_loss, other_norm, other_applied) in zip(*courses, strict=True):
        assert applied and other_applied
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert other_norm == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_between_updates_the_gpu_holds_no_states(ray_cluster: None, model: Path, stage: int) -> None:
    def memory(rank: Any) -> tuple[int, int, int]:
        import torch

        with rank.engine.optimizer_at_hand():
            there = torch.cuda.memory_allocated()
        return there, torch.cuda.memory_allocated(), sum(p.numel() for p in rank.model.parameters())

    with started(model, 0.5, policy={"zero_stage": stage, "offload_optimizer": True}) as (policy, _):
        learn(policy)
        there, away, parameters = policy.first(memory).result()
        assert there - away >= 12 * parameters  # two moments and the master weights
