"""Held-out evaluation with the generator and the reward sources of a job."""

from collections.abc import Sequence
from typing import Any

from actors.generator import Generator
from actors.group import gather
from actors.rewards import Rewards
from minigpt_ray.config import EvaluationConfig, SamplingConfig
from minigpt_ray.evaluation import evaluation_metrics
from minigpt_ray.rl.experience import Prompt, Rollout, RolloutBatch
from minigpt_ray.tracking import Tracker

ANSWERS_KEPT = 20
"""Answers of one evaluation that go to samples.jsonl."""


def evaluate(
    generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], sampling: SamplingConfig, sampled: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`eval/...` with the given sampling and, if `sampled`, `eval/sampled_...` with one answer each at temperature 1.

    Returns the metrics and one row per answer of the main figure for samples.jsonl.
    """
    metrics, rows = _score(generator, rewards, prompts, sampling, "eval/")
    if sampled:
        metrics |= _score(generator, rewards, prompts, SamplingConfig(max_tokens=sampling.max_tokens, stop=sampling.stop), "eval/sampled_")[0]
    return metrics, rows


def log_evaluation(tracker: Tracker, step: int, generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], config: EvaluationConfig) -> None:
    """Evaluate and log: metrics of all answers, some of the answers themselves."""
    metrics, rows = evaluate(generator, rewards, prompts, config.sampling, config.sampled)
    tracker.log(step, metrics)
    tracker.samples(step, rows[:ANSWERS_KEPT])


def _score(
    generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], sampling: SamplingConfig, prefix: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    rollouts = generator.generate(prompts, sampling)
    scores, verified = gather(rewards.score(rollouts, RolloutBatch.of(rollouts)), rewards.verify(rollouts)).result()
    totals = scores.total.tolist()
    return evaluation_metrics(rollouts, verified, totals, prefix), [sample_row(r, reward, kind="eval") for r, reward in zip(rollouts, totals, strict=True)]


def sample_row(rollout: Rollout, reward: float, kind: str = "train") -> dict[str, Any]:
    """A rollout as a line of samples.jsonl."""
    return {
        "kind": kind,
        "prompt": rollout.prompt.messages[-1]["content"],
        "response": rollout.text,
        "answer": None if rollout.prompt.answer is None else rollout.prompt.answer["answer"],
        "reward": reward,
        "source": rollout.prompt.source,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.token_ids),
    }
