"""Hints: each rule speaks when its value is out of range and is silent on a run that goes well."""

import re

import pytest

from minigpt_ray.config import PPOConfig, SFTConfig
from minigpt_ray.report.curves import Rows
from minigpt_ray.report.hints import RULES, hints, newest
from minigpt_ray.report.panels import PANELS

WELL = {
    "train/reward": 0.5,
    "train/kl": 0.01,
    "train/kl_ref": 0.1,
    "train/avg_response_len": 10,
    "policy/clip_fraction_low": 0.05,
    "policy/clip_fraction_high": 0.05,
    "policy/entropy": 0.7,
    "policy/early_stopped": 0,
    "policy/skipped_updates": 0,
    "critic/explained_variance": 0.4,
    "critic/value_clip_fraction": 0.1,
    "response/truncated_fraction": 0.02,
    "generator/logprob_gap_mean": 1e-5,
    "groups/drawn": 64,
    "groups/with_signal": 40,
    "rollouts/valid": 128,
    "reward/failed": 0,
    "time/step_s": 2.0,
    "time/overhead_s": 0.1,
    "train/actor_grad_norm": 1.0,
    "restarts/generator": 0,
}


def rows(**late: float) -> Rows:
    """40 steps of a run that goes well, in whose later half some values are others; `a__b` stands for a/b."""
    changed = {name.replace("__", "/"): value for name, value in late.items()}
    return [{"step": step, **WELL, **(changed if step > 20 else {})} for step in range(1, 41)]


def found(stage: str, given: Rows) -> list[str]:
    return [hint.found for hint in hints(stage, given)]


def test_a_run_that_goes_well_has_no_hints() -> None:
    assert hints("ppo", rows()) == [] and hints("ppo", []) == []


@pytest.mark.parametrize(
    ("late", "sentence"),
    [
        ({"train__kl": 0.3}, "The updates of one step move the policy by 0.300 nats per token."),
        ({"train__kl_ref": 2}, "The policy is 2.00 nats per token away from the reference."),
        ({"policy__clip_fraction_low": 0.4}, "45% of the tokens are clipped."),
        ({"policy__entropy": 0.01}, "The entropy has fallen from 0.700 to 0.0100 nats per token."),
        ({"critic__explained_variance": -0.5}, "The critic explains -0.50 of the returns' variance."),
        ({"critic__value_clip_fraction": 0.8}, "The value clip stops 80% of the critic's tokens."),
        ({"response__truncated_fraction": 0.5}, "50% of the responses are cut at the length limit."),
        ({"train__avg_response_len": 30}, "Responses have grown from 10 to 30 tokens, and the reward has not."),
        ({"groups__with_signal": 8}, "Only 12% of the prompts have answers with different rewards."),
        ({"generator__logprob_gap_mean": 0.2}, "The generator's logprobs are 0.200 nats from the policy's own."),
        ({"reward__failed": 64}, "50.0% of the rollouts have no score."),
        ({"policy__early_stopped": 1}, "100% of the newest steps ended early, at algorithm.kl_stop."),
        ({"policy__skipped_updates": 1}, "20 updates were refused, since a loss or a gradient was not finite."),
        ({"time__overhead_s": 1.0}, "In 50% of a step no role computes."),
        ({"restarts__generator": 2}, "Processes were replaced: generator 2 times."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_out_of_range_is_told(late: dict[str, float], sentence: str) -> None:
    assert found("ppo", rows(**late)) == [sentence]


def test_what_has_been_mended_is_not_told() -> None:
    assert hints("ppo", [*rows(train__kl=0.3), *({**row, "step": row["step"] + 40} for row in rows())]) == []


def test_one_sample_a_prompt_has_no_groups() -> None:
    assert found("ppo", rows(groups__with_signal=0, rollouts__valid=64)) == []


def test_a_reward_that_rises_while_exact_match_falls_is_over_optimised() -> None:
    evaluations = [{"step": step, "eval/accuracy": value} for step, value in ((0, 0.4), (15, 0.6), (40, 0.5))]
    assert found("ppo", [*rows(train__reward=0.9), *evaluations]) == [
        "The reward goes on rising, but held-out exact match has fallen from 60.0% (step 15) to 50.0%."
    ]
    assert found("ppo", [*rows(), *evaluations]) == []  # the reward has not risen


def test_one_gradient_among_many_is_a_spike() -> None:
    given = [{"step": step, "train/grad_norm": 50.0 if step == 7 else 1.0} for step in range(30)]
    assert found("sft", given) == ["train/grad_norm was 50 at step 7, 50 times its median."]


def test_supervised_stages() -> None:
    learning = [{"step": step, "train/loss": 3 / (1 + step)} for step in range(40)]
    validation = [{"step": step, "validation/loss": loss} for step, loss in ((10, 1.0), (20, 0.8), (39, 0.9))]
    assert found("sft", learning) == []
    assert found("sft", [*learning, *validation]) == ["Validation loss was lowest, 0.800, at step 20 and is 0.900 now."]
    apart = [{"step": step, "train/loss": 0.1 - step / 1000, "validation/loss": 0.5} for step in range(40)]
    assert found("sft", apart) == ["Validation loss is 0.500, and training loss 0.063."]
    assert found("pretrain", [{"step": step, "train/loss": 3.0} for step in range(40)]) == ["The loss began at 3.000 and is 3.000."]


def test_preferences() -> None:
    pairs = [{"step": step, "train/accuracy": 0.52, "train/margin": 0.1, "train/chosen_reward": -step / 19} for step in range(60)]
    assert found("dpo", pairs) == [
        "Only 52.0% of the pairs are ranked rightly.",
        "The margin is 0.10, but the reward of the chosen answers has fallen to -2.97.",
    ]
    assert found("reward_model", pairs) == ["Only 52.0% of the pairs are ranked rightly."]  # its rewards have no zero
    assert found("sft", pairs) == []
    known = [{"step": step, "train/accuracy": 0.99, "validation/accuracy": 0.7} for step in range(10)]
    assert found("reward_model", known) == ["Accuracy is 99.0% in training and 70.0% in validation."]


def test_the_newest_value_is_the_mean_of_the_last_tenth_and_of_five_at_least() -> None:
    given = [{"step": step, "x": float(step), "y": 2.0} for step in range(1, 101)]
    assert newest(given, "x") == 95.5 and newest(given[:20], "x") == 18.0 and newest(given[:2], "x") == 1.5
    assert newest(given, "x", over="y") == 47.75


def test_rules_name_plots_and_fields_that_exist() -> None:
    titles = {panel.title for panel in PANELS}
    assert [rule.panel for rule in RULES if rule.panel not in titles] == []
    dumped = {**SFTConfig().model_dump(), **PPOConfig().model_dump()}
    for rule in RULES:
        for path in re.findall(r"\b(?:algorithm|policy|critic|sampling|generator|weights|placement|optimizer)\.[a-z_.]*[a-z_]", rule.remedy):
            value = dumped
            for part in path.split("."):
                value = value[part]
