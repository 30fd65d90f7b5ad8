"""What the GPU tests share: a policy and a generator of the real classes, side by side on one GPU or on one each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before the imports below, which take their time
    pytest.skip("needs a CUDA device", allow_module_level=True)
for package in ("ray", "deepspeed", "vllm"):
    pytest.importorskip(package)

from actors.generator import Generator  # noqa: E402
from actors.placement import Cluster  # noqa: E402
from actors.policy import Policy  # noqa: E402
from actors.weights import Probe, Publication, probe_tokens, publish  # noqa: E402
from minigpt_ray.config import GeneratorConfig, PlacementConfig, PPOConfig, SamplingConfig  # noqa: E402
from minigpt_ray.models import TokenLogprobs, load_causal  # noqa: E402
from minigpt_ray.rl.experience import Prompt, Rollout  # noqa: E402

GREEDY = SamplingConfig(max_tokens=8, temperature=0)
PROMPTS = [Prompt(i, ({"role": "user", "content": "?"},), np.arange(10 + i, 15 + i, dtype=np.int32), "source", None) for i in range(4)]
ENGINE = {"max_num_seqs": 16, "gpu_memory_utilization": 0.3, "kv_cache_mib": 64}
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.2}
"""Nats: two engines multiply matrices on a GPU, with TensorFloat-32 or without."""

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@contextmanager
def started(
    model: Path,
    gpus: float,
    *,
    dtype: str = "bfloat16",
    transport: str = "object_store",
    policy: dict[str, Any] | None = None,
    generator: dict[str, Any] | None = None,
) -> Iterator[tuple[Policy, Generator]]:
    """A policy and a generator with so many GPUs each, and settings of their sections."""
    config = PPOConfig(
        policy={"init_from": str(model), "dtype": dtype, **(policy or {})},
        generator={"dtype": dtype, **ENGINE, **(generator or {})},
        weights={"transport": transport, "probe_tolerance": TOLERANCE[dtype], "bucket_mib": 1},
        placement={"policy": {"gpus": gpus}, "generator": {"gpus": gpus}},
    )
    with Cluster(config.placement, {"policy": config.placement.policy, "generator": config.placement.generator}) as cluster:
        learner = Policy(cluster, config)
        learner.ready()  # before the other measures the GPU that they share
        pool = Generator(cluster, str(model), config.generator, 64, 1, 0, config.weights.probe_tolerance)
        pool.ready()
        yield learner, pool


@contextmanager
def started_over_two(model: Path, sleep: bool) -> Iterator[Generator]:
    """One worker, its model split over two GPUs."""
    placement = PlacementConfig(generator={"gpus": 2, "tensor_parallel": 2})
    config = GeneratorConfig(sleep_between_phases=sleep, **ENGINE)
    with Cluster(placement, {"generator": placement.generator}) as cluster:
        generator = Generator(cluster, str(model), config, 64, 2, 0, TOLERANCE["float32"])
        generator.ready()
        yield generator


def published(path: Path, version: int) -> Publication:
    """The model at `path`, every weight moved, as the policy publishes it."""
    model = load_causal(str(path), "float32").eval()
    torch.manual_seed(version)
    ids = torch.tensor([probe_tokens(model.config.vocab_size)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        logprobs = TokenLogprobs(model)(ids, torch.arange(ids.shape[1])[None] > 0)[0][0, 1:]
    return publish(version, model.named_parameters(), 1 << 16, Probe(tuple(ids[0].tolist()), tuple(logprobs.tolist())))


def learn(policy: Policy) -> list[tuple[float, float, bool]]:
    """Three optimizer steps on fixed tokens: loss, gradient norm, whether it was applied."""

    def steps(rank: Any) -> list[tuple[float, float, bool]]:
        import torch

        ids = torch.arange(32, device=rank.engine.device).reshape(2, 16) + 4
        mask = torch.arange(16, device=rank.engine.device).expand(2, -1) > 0

        def loss(module: Any, ids: Any) -> Any:
            value = -module(ids, mask)[0].sum() / 30
            return value, {"loss": value}

        updates = [rank.engine.update([ids], loss) for _ in range(3)]
        return [(u.stats["loss"], u.grad_norm, u.applied) for u in updates]

    return policy.first(steps).result()


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.token_ids.tolist() for r in rollouts]
