"""What to worry about: rules that say, in plain words, when a value has left its healthy range, what that means and what to try.

A value is looked at over the newest steps, so that a hint is gone once the matter is; what leaves a trace, as a refused update or
a replaced process does, is told from then on. The ranges are rules of thumb: reasons to look, not to stop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minigpt_ray.report.curves import Rows, series

Finding = Callable[[Rows], str | None]
"""What the rows show, as a sentence, or None when there is nothing to say."""

FEW = 5
"""Fewest steps that a value is averaged over."""


@dataclass(frozen=True)
class Rule:
    """One thing that may go wrong."""

    panel: str
    """The title of the plot that shows it."""
    finding: Finding
    means: str
    remedy: str
    stages: tuple[str, ...] = ()
    """Where it is looked for; everywhere when empty."""


@dataclass(frozen=True)
class Hint:
    """A rule that found something."""

    panel: str
    found: str
    means: str
    remedy: str


def hints(stage: str, rows: Rows) -> list[Hint]:
    """What the rows of a stage give reason to look at, in the order of RULES."""
    found = [(rule, rule.finding(rows)) for rule in RULES if not rule.stages or stage in rule.stages]
    return [Hint(rule.panel, text, rule.means, rule.remedy) for rule, text in found if text is not None]


# ------------------------------------------------------------------------------------------------------ findings


def newest(rows: Rows, metric: str, over: str = "") -> float:
    """Mean of the last tenth of the values, of at least FEW where there are so many; nan without any."""
    values = series(rows, metric, over)[1]
    return float(values[-max(FEW, len(values) // 10) :].mean()) if len(values) else math.nan


def oldest(rows: Rows, metric: str) -> float:
    """The same of the first tenth."""
    values = series(rows, metric)[1]
    return float(values[: max(FEW, len(values) // 10)].mean()) if len(values) else math.nan


def above(metric: str, limit: float, sentence: str, over: str = "") -> Finding:
    """`sentence`, with the value in it, when the newest mean is above `limit`."""

    def find(rows: Rows) -> str | None:
        value = newest(rows, metric, over)
        return sentence.format(value) if value > limit else None

    return find


def below(metric: str, limit: float, sentence: str, after: int = 0) -> Finding:
    """The same below `limit`, once there are more than `after` values."""

    def find(rows: Rows) -> str | None:
        value = newest(rows, metric)
        return sentence.format(value) if value < limit and len(series(rows, metric)[1]) > after else None

    return find


def ever(metrics: tuple[str, ...], sentence: str) -> Finding:
    """`sentence`, with the sum over all steps in it, when that is not 0."""

    def find(rows: Rows) -> str | None:
        count = sum(float(series(rows, metric)[1].sum()) for metric in metrics)
        return sentence.format(count) if count else None

    return find


def many_clipped(rows: Rows) -> str | None:
    share = newest(rows, "policy/clip_fraction_low") + newest(rows, "policy/clip_fraction_high")
    return f"{share:.0%} of the tokens are clipped." if share > 0.3 else None


def entropy_is_gone(rows: Rows) -> str | None:
    before, now = oldest(rows, "policy/entropy"), newest(rows, "policy/entropy")
    return f"The entropy has fallen from {before:.3f} to {now:.4f} nats per token." if now < 0.1 * before and now < 0.05 else None


def held_out_falls(rows: Rows) -> str | None:
    steps, accuracy = series(rows, "eval/accuracy")
    if len(steps) < 3:
        return None
    best = int(accuracy.argmax())
    then = [row for row in rows if row["step"] <= steps[best]]
    if accuracy[best] - accuracy[-1] > 0.03 and newest(rows, "train/reward") > newest(then, "train/reward"):
        return f"The reward goes on rising, but held-out exact match has fallen from {accuracy[best]:.1%} (step {steps[best]:.0f}) to {accuracy[-1]:.1%}."
    return None


def longer_for_nothing(rows: Rows) -> str | None:
    before, now = oldest(rows, "train/avg_response_len"), newest(rows, "train/avg_response_len")
    if now > 1.5 * before and newest(rows, "train/reward") <= oldest(rows, "train/reward"):
        return f"Responses have grown from {before:.0f} to {now:.0f} tokens, and the reward has not."
    return None


def little_signal(rows: Rows) -> str | None:
    drawn, share = newest(rows, "groups/drawn"), newest(rows, "groups/with_signal", "groups/drawn")
    return f"Only {share:.0%} of the prompts have answers with different rewards." if share < 0.3 and newest(rows, "rollouts/valid") > 1.5 * drawn else None


def gradient_spikes(rows: Rows) -> str | None:
    for metric in ("train/actor_grad_norm", "train/critic_grad_norm", "train/grad_norm"):
        steps, values = series(rows, metric)
        if len(values) >= 20 and values.max() > 20 * np.median(values):
            return f"{metric} was {values.max():.3g} at step {steps[values.argmax()]:.0f}, {values.max() / np.median(values):.0f} times its median."
    return None


def replaced(rows: Rows) -> str | None:
    counts = {name.removeprefix("restarts/"): row[name] for row in rows for name in row if name.startswith("restarts/") and row[name] > 0}
    return f"Processes were replaced: {', '.join(f'{role} {count:.0f} times' for role, count in counts.items())}." if counts else None


def overfits(rows: Rows) -> str | None:
    steps, validation = series(rows, "validation/loss")
    if len(steps) < 3:
        return None
    best = int(validation.argmin())
    if validation[-1] > 1.03 * validation[best] and newest(rows, "train/loss") < validation[-1]:
        return f"Validation loss was lowest, {validation[best]:.3f}, at step {steps[best]:.0f} and is {validation[-1]:.3f} now."
    if validation[-1] > 3 * newest(rows, "train/loss"):
        return f"Validation loss is {validation[-1]:.3f}, and training loss {newest(rows, 'train/loss'):.3f}."
    return None


def does_not_learn(rows: Rows) -> str | None:
    before, now = oldest(rows, "train/loss"), newest(rows, "train/loss")
    return f"The loss began at {before:.3f} and is {now:.3f}." if len(series(rows, "train/loss")[1]) >= 20 and now >= before else None


def known_by_heart(rows: Rows) -> str | None:
    training, validation = newest(rows, "train/accuracy"), newest(rows, "validation/accuracy")
    return f"Accuracy is {training:.1%} in training and {validation:.1%} in validation." if training - validation > 0.15 else None


def chosen_falls(rows: Rows) -> str | None:
    before, now, margin = oldest(rows, "train/chosen_reward"), newest(rows, "train/chosen_reward"), newest(rows, "train/margin")
    return f"The margin is {margin:.2f}, but the reward of the chosen answers has fallen to {now:.2f}." if now < before - 1 and margin > 0 else None


# --------------------------------------------------------------------------------------------------------- rules

RULES = (
    Rule(
        "Reward",
        held_out_falls,
        "The policy has found what the reward likes and the task does not: it is being over-optimised.",
        "take the checkpoint of the best evaluation, raise algorithm.kl_coef or set algorithm.kl_target, or mend the reward",
    ),
    Rule(
        "KL of one step",
        above("train/kl", 0.1, "The updates of one step move the policy by {:.3f} nats per token."),
        "The later mini-batches learn from data of a policy that is no longer there, and what was learnt may be lost at once.",
        "lower policy.optimizer.lr or algorithm.ppo_epochs, or set algorithm.kl_stop",
    ),
    Rule(
        "KL to the reference",
        above("train/kl_ref", 0.5, "The policy is {:.2f} nats per token away from the reference."),
        "It writes what the reference would hardly ever write: good when the rewards are rules, a warning when they are a model's.",
        "read the samples below; raise algorithm.kl_coef, or set algorithm.kl_target",
    ),
    Rule(
        "Clipped tokens",
        many_clipped,
        "So much of the batch pushes no further that the step is larger than the clip is made for.",
        "lower policy.optimizer.lr or algorithm.ppo_epochs, or take larger mini-batches",
    ),
    Rule(
        "Entropy",
        entropy_is_gone,
        "The policy has stopped to explore: all samples of a prompt are alike, and there is nothing left to prefer.",
        "raise sampling.temperature, algorithm.entropy_coef or algorithm.clip_high, or stop here",
    ),
    Rule(
        "Explained variance",
        below("critic/explained_variance", 0.0, "The critic explains {:.2f} of the returns' variance.", after=20),
        "It foresees less than a constant would, so it adds noise to the advantages.",
        "raise critic.optimizer.lr or algorithm.critic_warmup_steps, begin the critic from a reward model, or use an estimator without a critic",
    ),
    Rule(
        "Critic loss",
        above("critic/value_clip_fraction", 0.5, "The value clip stops {:.0%} of the critic's tokens."),
        "The critic may move only so much in a step, and wants to move further.",
        "raise algorithm.value_clip, or set it to null",
    ),
    Rule(
        "Truncated responses",
        above("response/truncated_fraction", 0.2, "{:.0%} of the responses are cut at the length limit."),
        "What is cut cannot be right, and the policy does not learn to end.",
        "raise sampling.max_tokens, or set algorithm.length_penalty; look whether the model of the stage before knows its end token",
    ),
    Rule(
        "Response length",
        longer_for_nothing,
        "Longer answers bring nothing: the policy drifts, or it waits for the end to come by chance.",
        "set algorithm.length_free and algorithm.length_penalty, or raise algorithm.kl_coef",
    ),
    Rule(
        "Groups with signal",
        little_signal,
        "The other groups are all right or all wrong and teach a group estimator nothing.",
        "choose prompts that the model gets right now and then, raise sampling.n or sampling.temperature, or set algorithm.replacement_rounds",
    ),
    Rule(
        "Generator and learner agree",
        above("generator/logprob_gap_mean", 0.05, "The generator's logprobs are {:.3f} nats from the policy's own."),
        "Responses are not drawn from the policy that learns from them: old weights, another temperature or too coarse a dtype.",
        "compare generator.dtype and policy.dtype, and look at weights/probe_gap",
    ),
    Rule(
        "Reward",
        above("reward/failed", 0.01, "{:.1%} of the rollouts have no score.", over="rollouts/valid"),
        "They were generated for nothing, and what they would have taught is missing.",
        "look at reward_calls/... in metrics.jsonl for the source and the kind of failure",
    ),
    Rule(
        "KL of one step",
        above("policy/early_stopped", 0.5, "{:.0%} of the newest steps ended early, at algorithm.kl_stop."),
        "Most of each batch is not learnt from.",
        "lower policy.optimizer.lr or algorithm.ppo_epochs",
    ),
    Rule(
        "Gradient norm",
        ever(("policy/skipped_updates", "critic/skipped_updates"), "{:.0f} updates were refused, since a loss or a gradient was not finite."),
        "The numbers overflow somewhere: too large a step, or a dtype that is too small.",
        "look at the batch in non_finite/, lower the learning rate, or compute in float32",
    ),
    Rule(
        "Gradient norm",
        gradient_spikes,
        "Single batches pull much harder than the others; clipping holds them, but what they taught is lost.",
        "lower the learning rate, lengthen its warm-up, or look for broken rows in the data",
    ),
    Rule(
        "Overhead",
        above("time/overhead_s", 0.25, "In {:.0%} of a step no role computes.", over="time/step_s"),
        "The driver's calls and the transport of weights weigh more than the mathematics.",
        "give a step more work (prompts_per_step), share processes (placement.colocate), or use weights.transport=nccl or cuda_ipc on GPUs",
    ),
    Rule("Idle share of each role", replaced, "Nothing is lost, but each replacement costs time, and there may be a reason.", "look for memory (memory/...) and at the log of that role"),
    Rule(
        "Loss",
        overfits,
        "The model learns the training rows by heart.",
        "stop earlier, use more data or fewer passes, or raise optimizer.weight_decay",
    ),
    Rule("Loss", does_not_learn, "Nothing is learnt, or what was learnt is lost.", "lower optimizer.lr, lengthen its warm-up, and look at a row of the data with python -m jobs.prepare_data --check"),
    Rule("Accuracy", known_by_heart, "The pairs of the training set are known by heart.", "use fewer steps or more pairs, or lower the learning rate", ("dpo", "reward_model")),
    Rule(
        "Accuracy",
        below("train/accuracy", 0.55, "Only {:.1%} of the pairs are ranked rightly.", after=50),
        "The preferences are noise to this model, or chosen and rejected are confused.",
        "read some pairs; raise the learning rate; begin from a larger or better trained model",
        ("dpo", "reward_model"),
    ),
    Rule(
        "Chosen and rejected",
        chosen_falls,
        "Both answers become less likely, the rejected one faster: probability goes to texts that nobody preferred.",
        "set nll_weight, raise beta, or lower the learning rate",
        ("dpo",),
    ),
)  # fmt: skip
