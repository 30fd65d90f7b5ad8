"""Metrics of a step that follow from its rollouts and scores; docs/metrics.md gives the formula of every name.

Each is computed once, from the whole step's values and before anything is cut into batches. nan: there was nothing to count.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minigpt_ray.rl.experience import Experience, Rollout, RolloutBatch, Scores
from minigpt_ray.rl.kl import k1


def rollout_metrics(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Lengths, drops and staleness of what the generator delivered; version: the newest publication when they were asked for."""
    valid = [r for r in rollouts if r.valid]
    lengths = torch.tensor([int(r.model_mask.sum()) for r in valid], dtype=torch.float64)
    truncated = torch.tensor([r.truncated for r in valid], dtype=torch.float64)
    versions = [torch.from_numpy(r.weight_versions[r.model_mask]) for r in valid]
    staleness = version - torch.cat(versions).double() if valid else torch.zeros(0, dtype=torch.float64)
    return {
        "train/avg_response_len": float(lengths.mean()),
        "response/length_p5": _quantile(lengths, 0.05),
        "response/length_p50": _quantile(lengths, 0.5),
        "response/length_p95": _quantile(lengths, 0.95),
        "response/length_max": _quantile(lengths, 1.0),
        "response/truncated_fraction": float(truncated.mean()),
        "rollouts/valid": float(len(valid)),
        "rollouts/dropped": float(len(rollouts) - len(valid)),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": _quantile(staleness, 1.0),
    }


def score_metrics(rollouts: Sequence[Rollout], batch: RolloutBatch, scores: Scores, experience: Experience) -> dict[str, float]:
    """Rewards, distance to the reference, advantages, and how the generator's logprobs hold up.

    Over the rollouts and tokens that `experience.response_mask` counts: valid, and with a score of every source.
    """
    mask = experience.response_mask
    counted = mask.any(1)
    rewards = scores.rewards
    total = rewards.total[counted].double()
    gap = _tokens(batch.generator_logprobs - scores.policy_logprobs, mask).abs()
    advantages = _tokens(experience.advantages, mask)
    return {
        "train/reward": float(total.mean()),
        "reward/std": _variance(total) ** 0.5,
        "reward/failed": float(rewards.failed.sum()),
        **{f"reward/{name}": float(x[counted].double().mean()) for name, x in rewards.by_source.items()},
        **_reward_by_source(rollouts, rewards.total, counted),
        "train/kl_ref": float(_tokens(k1(scores.policy_logprobs, scores.reference_logprobs), mask).mean()),
        "train/kl_coef": experience.kl_coef,
        "generator/logprob_gap_mean": float(gap.mean()),
        "generator/logprob_gap_max": _quantile(gap, 1.0),
        "advantages/mean": float(advantages.mean()),
        "advantages/std": _variance(advantages) ** 0.5,
    }


def value_metrics(experience: Experience) -> dict[str, float]:
    """How the critic's values before the step's first update hold up, over response tokens."""
    returns, values = (_tokens(x, experience.response_mask) for x in (experience.returns, experience.values))
    return {
        "critic/explained_variance": explained_variance(values, returns),
        "critic/values_mean": float(values.mean()),
        "critic/returns_mean": float(returns.mean()),
    }


def explained_variance(values: Float[Tensor, "N"], returns: Float[Tensor, "N"]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one, nan for constant returns."""
    variance = _variance(returns)
    return 1 - _variance(returns - values) / variance if variance > 0 else float("nan")


def _reward_by_source(rollouts: Sequence[Rollout], total: Float[Tensor, "B"], counted: Bool[Tensor, "B"]) -> dict[str, float]:
    """Mean reward of the prompts of each source; a source that drew no counted rollout in this step is left out."""
    rewards: dict[str, list[float]] = {}
    for rollout, reward, counts in zip(rollouts, total.tolist(), counted.tolist(), strict=True):
        if counts:
            rewards.setdefault(rollout.prompt.source, []).append(reward)
    return {f"reward_by_source/{source}": sum(of_source) / len(of_source) for source, of_source in sorted(rewards.items())}


def _tokens(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "N"]:
    return x[mask].double()


def _variance(x: Float[Tensor, "N"]) -> float:
    return float((x - x.mean()).square().mean())


def _quantile(x: Float[Tensor, "N"], share: float) -> float:
    return float(x.quantile(share)) if len(x) else float("nan")
