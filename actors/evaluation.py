"""Held-out evaluation, and the judging of answers, with the generator and the reward sources of a job."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.attempts import RewardError
from actors.fatal_prompts import FatalPrompts
from actors.generator import Generator
from actors.group import OutOfRestarts, gather
from actors.rewards import Rewards
from actors.weights import WeightsError
from minigpt_ray.config import EvaluationConfig, SamplingConfig
from minigpt_ray.data.preferences import RIGHT, Answer, Answers
from minigpt_ray.data.records import DataError
from minigpt_ray.evaluation import Judged, evaluation_metrics
from minigpt_ray.rl.experience import Prompt, Rollout, RolloutBatch
from minigpt_ray.tracking import Timer, Tracker

SENTENCES = (DataError, FatalPrompts, OutOfRestarts, RewardError, WeightsError)
"""What ends a job that generates and judges answers, and says in a sentence why."""
ANSWERS_KEPT = 20
"""Answers of one evaluation that go to samples.jsonl."""


def evaluate(
    generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], sampling: SamplingConfig, sampled: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`eval/...` with the given sampling and, if `sampled`, `eval/sampled_...` with one answer each at temperature 1.

    Returns the metrics and one row per answer of the main figure for samples.jsonl.
    """
    main = judge(generator, rewards, prompts, sampling)
    metrics = evaluation_metrics(main.rollouts, main.verified, main.rewards)
    if sampled:
        drawn = judge(generator, rewards, prompts, at_temperature_one(sampling))
        metrics |= evaluation_metrics(drawn.rollouts, drawn.verified, drawn.rewards, "eval/sampled_")
    return metrics, [sample_row(rollout, reward, kind="eval") for rollout, reward in zip(main.rollouts, main.rewards, strict=True)]


def log_evaluation(tracker: Tracker, step: int, generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], config: EvaluationConfig) -> None:
    """Evaluate and log: metrics of all answers, some of the answers themselves."""
    with Timer(tracker.phase)("evaluate"):
        metrics, rows = evaluate(generator, rewards, prompts, config.sampling, config.sampled)
    tracker.log(step, metrics)
    tracker.samples(step, rows[:ANSWERS_KEPT])


def judge(generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], sampling: SamplingConfig) -> Judged:
    """Answers to all prompts, verified and scored."""
    rollouts = generator.generate(prompts, sampling)
    return judge_answers(rewards, rollouts)


def judge_answers(rewards: Rewards, rollouts: Sequence[Rollout]) -> Judged:
    """What the verifier and every reward source say about some answers, all at once; about those that the generator gave up there is nothing to say."""
    rollouts = [rollout for rollout in rollouts if rollout.valid]
    if not rollouts:
        return Judged([], [], [], {name: [] for name in rewards.sources}, [])
    scores, verified = gather(rewards.score(rollouts, RolloutBatch.of(rollouts)), rewards.verify(rollouts)).result()
    by_source = {name: values.tolist() for name, values in scores.by_source.items()}
    return Judged(rollouts, verified, scores.total.tolist(), by_source, scores.failed.tolist())


def judged_answers(
    generator: Generator, rewards: Rewards, prompts: Sequence[Prompt], right: Mapping[int, Rollout], sampling: SamplingConfig, chunk: int
) -> Iterator[Answers]:
    """The answers to each prompt, judged together with its right answer where there is one, in chunks while the rest still generates."""
    for rollouts in generator.stream(prompts, sampling, chunk):
        serials = dict.fromkeys(rollout.group for rollout in rollouts)
        judged = judge_answers(rewards, [*rollouts, *(right[serial] for serial in serials if serial in right)])
        answers: dict[int, list[Answer]] = {serial: [] for serial in serials}
        known: dict[int, Answer] = {}
        for rollout, verified, reward, failed in zip(judged.rollouts, judged.verified, judged.rewards, judged.failed, strict=True):
            answer = Answer(rollout.text, math.nan if failed else reward, verified, not rollout.truncated)
            if rollout.sample == RIGHT:
                known[rollout.group] = answer
            else:
                answers[rollout.group].append(answer)
        of_serial = {rollout.group: rollout.prompt for rollout in rollouts}
        yield from (Answers(of_serial[serial], tuple(answers[serial]), known.get(serial)) for serial in serials)


def at_temperature_one(sampling: SamplingConfig, n: int = 1) -> SamplingConfig:
    """n answers drawn from the model's own distribution, as long as those of `sampling`."""
    return SamplingConfig(max_tokens=sampling.max_tokens, stop=sampling.stop, n=n)


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
