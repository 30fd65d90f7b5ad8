"""bfloat16: what the learner holds, what it publishes, and how far the generator is from it."""

from pathlib import Path
from typing import Any

import pytest

from .common import learn, started

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


def test_weights_are_bfloat16_and_the_optimizer_and_the_rotary_frequencies_are_not(ray_cluster: None, model: Path) -> None:
    def dtypes(rank: Any) -> dict[str, set[str]]:
        return {
            "weights": {str(p.dtype) for p in rank.model.parameters()},
            "master": {str(p.dtype) for p in rank.engine.engine.optimizer.single_partition_of_fp32_groups},
            "rotary": {str(buffer.dtype) for name, buffer in rank.model.named_buffers() if "inv_freq" in name},
        }

    with started(model, 0.5) as (policy, _):
        assert policy.first(dtypes).result() == {"weights": {"torch.bfloat16"}, "master": {"torch.float32"}, "rotary": {"torch.float32"}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_generator_follows_the_policy_within_the_rounding_of_bfloat16(ray_cluster: None, model: Path, stage: int) -> None:
    with started(model, 0.5, policy={"zero_stage": stage, "optimizer": {"lr": 1e-3}}) as (policy, generator):
        for version in (1, 2, 3):
            assert all(applied for _, _, applied in learn(policy))
            publication = policy.publish(version)
            assert {spec.dtype for spec in publication.manifest} == {"bfloat16"}
            generator.receive(publication)
            assert max(r.probe_gap for r in generator.received) < 0.2
