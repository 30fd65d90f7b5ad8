"""A policy that broadcasts its weights to a generator over gloo, the code that runs over NCCL between GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from actors.generator import Generator
from actors.placement import Cluster
from actors.policy import Policy, PolicyRank
from minigpt_ray.config import GeneratorConfig, PlacementConfig, PPOConfig, SamplingConfig, WeightsConfig
from minigpt_ray.rl.experience import Prompt, Rollout

GREEDY = SamplingConfig(max_tokens=8, temperature=0)
PROMPTS = [Prompt(i, ({"role": "user", "content": "?"},), np.arange(10 + i, 15 + i, dtype=np.int32), "source", None) for i in range(4)]


@contextmanager
def started(model: Path, placement: PlacementConfig, engine: GeneratorConfig, max_model_len: int) -> Iterator[tuple[Policy, Generator]]:
    """Both roles, ready."""
    config = PPOConfig(policy={"init_from": str(model)}, placement=placement)
    config = config.model_copy(update={"weights": WeightsConfig(transport="nccl", bucket_mib=1)})  # on CPUs a configuration refuses it
    with Cluster(placement, {"generator": placement.generator, "policy": placement.policy}) as cluster:
        policy = Policy(cluster, config)
        policy._bucket_bytes = 1 << 16  # several buckets of this small a model
        generator = Generator(cluster, str(model), engine, max_model_len, placement.generator.tensor_parallel, 0, 1e-3)
        policy.ready()
        generator.ready()
        yield policy, generator


def move(policy: Policy, change: float) -> None:
    """Every weight."""

    def add(rank: PolicyRank) -> None:
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in rank.model.parameters():
                parameter += change * torch.randn_like(parameter)

    policy.call(add).result()


def corrupt(policy: Policy) -> None:
    """A byte of what is published changes."""

    def change(rank: PolicyRank) -> None:
        buckets = rank.transport._buckets  # type: ignore[attr-defined]
        buckets[1] = buckets[1].copy()
        buckets[1][100] ^= 1

    policy.call(change).result()


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.token_ids.tolist() for r in rollouts]
