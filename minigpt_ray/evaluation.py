"""Scoring answers to held-out prompts."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from minigpt_ray.rl.experience import Rollout


def evaluation_metrics(rollouts: Sequence[Rollout], verified: Sequence[float], rewards: Sequence[float], prefix: str = "eval/") -> dict[str, float]:
    """Means over rollouts, in all and by source of the prompt.

    `accuracy` is the share of answers that the verifier gives its full score (exact match), over prompts that carry an
    answer; `mean_reward` the mean of `rewards`; `avg_response_len` counts response tokens.
    """
    checked = [(rollout.prompt.source, score == 1.0) for rollout, score in zip(rollouts, verified, strict=True) if not math.isnan(score)]
    sources = sorted({source for source, _ in checked})
    return {
        f"{prefix}accuracy": _mean([right for _, right in checked]),
        f"{prefix}mean_reward": _mean(rewards),
        f"{prefix}avg_response_len": _mean([len(rollout.token_ids) for rollout in rollouts]),
        f"{prefix}truncated_fraction": _mean([rollout.truncated for rollout in rollouts]),
        **({f"{prefix}accuracy/{s}": _mean([right for source, right in checked if source == s]) for s in sources} if len(sources) > 1 else {}),
    }


def _mean(values: Sequence[int | float]) -> float:
    return sum(values) / len(values) if values else math.nan


def results_table(results: Mapping[str, Mapping[str, float]], num_prompts: int) -> Table:
    """One row per model: what a person looks at first."""
    table = Table(title=f"{num_prompts} held-out prompts")
    table.add_column("model")
    for title in ("exact match", "sampled exact match", "mean reward", "mean response length"):
        table.add_column(title, justify="right")
    for name, metrics in results.items():
        sampled = f"{metrics['eval/sampled_accuracy']:.1%}" if "eval/sampled_accuracy" in metrics else ""
        table.add_row(name, f"{metrics['eval/accuracy']:.1%}", sampled, f"{metrics['eval/mean_reward']:.3f}", f"{metrics['eval/avg_response_len']:.1f}")
    return table
