"""Scoring answers to held-out prompts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from minigpt_ray import intervals
from minigpt_ray.intervals import Estimate
from minigpt_ray.rl.rollout import Rollout


@dataclass(frozen=True)
class Judged:
    """Answers, and what was found about each: one place of every list for each rollout."""

    rollouts: Sequence[Rollout]
    verified: Sequence[float]
    """Score of the verifier in [0, 1], nan for prompts without an answer."""
    rewards: Sequence[float]
    """Weighted sum of the reward sources."""
    by_source: Mapping[str, Sequence[float]]
    """Unweighted score of each reward source."""
    failed: Sequence[bool]
    """True where a source gave no score."""


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


# ---------------------------------------------------------------------------------------- figures with their intervals


def figures(judged: Judged, seed: int, prefix: str = "eval/") -> dict[str, float]:
    """evaluation_metrics and besides `verifier_score` and `reward/<name>`, each with the ends of its interval, `..._low` and `..._high`.

    What there was nothing to measure of is left out. The intervals of shares are Wilson's where a prompt has one answer; the others
    are bootstrapped over prompts with `seed`, since several answers to one prompt are not independent.
    """
    rollouts = judged.rollouts
    right = [score if math.isnan(score) else float(score == 1.0) for score in judged.verified]
    sources = sorted({rollout.prompt.source for rollout, score in zip(rollouts, right, strict=True) if not math.isnan(score)})
    of_source = {source: [score if r.prompt.source == source else math.nan for r, score in zip(rollouts, right, strict=True)] for source in sources}
    shares = {
        "accuracy": right,
        "truncated_fraction": [float(rollout.truncated) for rollout in rollouts],
        **({f"accuracy/{source}": scores for source, scores in of_source.items()} if len(sources) > 1 else {}),
    }
    means = {
        "mean_reward": judged.rewards,
        "avg_response_len": [float(len(rollout.token_ids)) for rollout in rollouts],
        "verifier_score": judged.verified,
        **{f"reward/{name}": _scored(scores, judged.failed) for name, scores in judged.by_source.items()},
    }
    estimates: dict[str, Estimate] = {}
    for name, values in {**shares, **means}.items():
        by_prompt = list(_by_prompt(judged, values).values())
        one_answer_each = len(by_prompt) == sum(math.isfinite(value) for value in values)
        if by_prompt and name in shares and one_answer_each:
            estimates[f"{prefix}{name}"] = intervals.proportion(round(sum(by_prompt)), len(by_prompt))
        elif by_prompt:
            estimates[f"{prefix}{name}"] = intervals.mean(np.array(by_prompt), seed)
    return _flat(estimates)


def pass_figures(judged: Judged, n: int, ks: Sequence[int], seed: int) -> dict[str, float]:
    """`eval/pass_at_<k>` from n answers to each prompt, over prompts that carry an answer; the intervals are bootstrapped."""
    right = _by_prompt(judged, [score if math.isnan(score) else float(score == 1.0) for score in judged.verified])
    counts = [round(share * n) for share in right.values()]
    return _flat({f"eval/pass_at_{k}": intervals.mean(np.array([intervals.pass_at_k(n, c, k) for c in counts]), seed) for k in ks if counts})


def win_rate(judged: Judged, baseline: Judged, judge: str | None, name: str, seed: int) -> dict[str, float]:
    """`eval/win_rate/<name>`: share of prompts on which a model's answer is scored higher than that of the baseline `name`, ties half.

    Scored by the reward source `judge`, or by the weighted sum of all. Prompts to which a source has not scored both answers do
    not count. The interval is bootstrapped: with ties this is no proportion.
    """
    ours, theirs = (_by_prompt(j, _scored(j.rewards if judge is None else j.by_source[judge], j.failed)) for j in (judged, baseline))
    both = [prompt for prompt in ours if prompt in theirs]
    if not both:
        return {}
    won = intervals.wins(np.array([ours[group] for group in both]), np.array([theirs[group] for group in both]))
    return _flat({f"eval/win_rate/{name}": intervals.mean(won, seed)})


def _scored(scores: Sequence[float], failed: Sequence[bool]) -> list[float]:
    """The scores, nan where a source gave none."""
    return [math.nan if without else score for score, without in zip(scores, failed, strict=True)]


def _by_prompt(judged: Judged, values: Sequence[float]) -> dict[int, float]:
    """Mean of the finite values of each prompt, by its serial number; prompts without one are left out."""
    values_of: dict[int, list[float]] = {}
    for rollout, value in zip(judged.rollouts, values, strict=True):
        if math.isfinite(value):
            values_of.setdefault(rollout.group, []).append(value)
    return {prompt: _mean(values) for prompt, values in values_of.items()}


def _flat(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: number for key, e in estimates.items() for name, number in ((key, e.value), (f"{key}_low", e.low), (f"{key}_high", e.high))}


# -------------------------------------------------------------------------------------------------------------- table


def _columns(results: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str, str]]:
    """Title, metric and form of every column: what a person looks at first, then what was asked for besides."""
    measured = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    sources = [name for name in measured if name.startswith("eval/reward/") and not name.endswith(("_low", "_high"))]
    yield "exact match", "eval/accuracy", "{:.1%}"
    yield "sampled exact match", "eval/sampled_accuracy", "{:.1%}"
    yield "mean reward", "eval/mean_reward", "{:.3f}"
    yield from ((name.removeprefix("eval/reward/"), name, "{:.3f}") for name in sources if len(sources) > 1)
    yield "mean response length", "eval/avg_response_len", "{:.1f}"
    for name in measured:
        if name.startswith("eval/pass_at_") and not name.endswith(("_low", "_high")):
            yield f"pass@{name.removeprefix('eval/pass_at_')}", name, "{:.1%}"
        elif name.startswith("eval/win_rate/") and not name.endswith(("_low", "_high")):
            yield f"wins against {name.removeprefix('eval/win_rate/')}", name, "{:.1%}"


def results_table(results: Mapping[str, Mapping[str, float]], num_prompts: int) -> Table:
    """One row per model; below each figure the ends of its interval, where they are known."""
    columns = list(_columns(results))
    intervals_known = any(f"{metric}_low" in metrics for metrics in results.values() for _, metric, _ in columns)
    table = Table(title=f"{num_prompts} held-out prompts", caption="in brackets: 95 % confidence" if intervals_known else None)
    table.add_column("model", overflow="fold")
    for title, _, _ in columns:
        table.add_column(title, justify="right", overflow="fold")
    for name, metrics in results.items():
        table.add_row(name, *(_cell(metrics, metric, form) for _, metric, form in columns))
    return table


def _cell(metrics: Mapping[str, float], metric: str, form: str) -> str:
    if metric not in metrics:
        return ""
    if f"{metric}_low" not in metrics:
        return form.format(metrics[metric])
    low, high = (form.format(metrics[f"{metric}_{end}"]).removesuffix("%") for end in ("low", "high"))
    return f"{form.format(metrics[metric])}\n\\[{low}, {high}]"
