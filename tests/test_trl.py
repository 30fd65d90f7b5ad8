"""Advantages, whitening and losses are those of TRL's own functions; tests/golden/make_trl_ppo.py and make_trl_preferences.py made the tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt_ray.config import DPOConfig
from minigpt_ray.losses import PREFERENCE_LOSSES, Loss, PairLogprobs, clipped_policy_loss, clipped_value_loss, log_odds_loss
from minigpt_ray.rl.advantages import EstimatorInputs, gae, whiten

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "trl_ppo.json").read_text())["cases"]
PREFERENCES = json.loads((GOLDEN / "trl_preferences.json").read_text())
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def read(case: dict[str, Any], name: str) -> Tensor:
    return torch.tensor(case[name])


def mask_of(case: dict[str, Any]) -> Tensor:
    return torch.tensor(case["mask"], dtype=torch.bool)


def estimate(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """All responses are finished, since TRL expects nothing after the last token."""
    mask = mask_of(case)
    lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(1)
    values = torch.nn.functional.pad(read(case, "values"), (0, 1))
    finished = torch.zeros(len(mask), dtype=torch.bool)
    groups = torch.arange(len(mask))
    advantages = gae(EstimatorInputs(read(case, "rewards"), values, mask, lengths, finished, groups, case["discount"], case["gae_lambda"], True))
    return advantages, advantages + torch.where(mask, values[:, :-1], 0)


def policy_loss(case: dict[str, Any], logprobs: Tensor) -> Loss:
    mask, old, advantages = mask_of(case), read(case, "old_logprobs"), read(case, "advantages")
    return clipped_policy_loss(logprobs, old, advantages, mask, int(mask.sum()), case["clip"], case["clip"], None)


@pytest.mark.parametrize("case", CASES)
def test_returns_are_trls(case: dict[str, Any]) -> None:
    mask = mask_of(case)
    torch.testing.assert_close(estimate(case)[1][mask], read(case, "returns")[mask], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_whitened_advantages_are_trls_but_for_its_unbiased_variance(case: dict[str, Any]) -> None:
    mask = mask_of(case)
    count = int(mask.sum())
    found = whiten(estimate(case)[0], mask)[mask] * ((count - 1) / count) ** 0.5
    torch.testing.assert_close(found, read(case, "advantages")[mask], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_policy_loss_gradient_and_clip_fraction_are_trls(case: dict[str, Any]) -> None:
    logprobs = read(case, "logprobs").requires_grad_()
    loss = policy_loss(case, logprobs)
    loss.loss.backward()
    assert loss.loss.item() == pytest.approx(case["policy_loss"], rel=1e-5)
    torch.testing.assert_close(logprobs.grad, read(case, "policy_gradient"), **CLOSE)
    assert float(loss.stats["clip_fraction_low"] + loss.stats["clip_fraction_high"]) == pytest.approx(case["policy_clip_fraction"], rel=1e-5)
    assert 0 < case["policy_clip_fraction"] < 1
    assert loss.stats["ratio_mean"].item() == pytest.approx(case["ratio_mean"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_value_loss_gradient_and_clip_fraction_are_trls(case: dict[str, Any]) -> None:
    mask, values = mask_of(case), read(case, "new_values").requires_grad_()
    loss = clipped_value_loss(values, read(case, "values"), read(case, "returns"), mask, int(mask.sum()), case["value_clip"])
    loss.loss.backward()
    assert loss.loss.item() == pytest.approx(case["value_loss"], rel=1e-5)
    torch.testing.assert_close(values.grad, read(case, "value_gradient"), **CLOSE)
    assert loss.stats["value_clip_fraction"].item() == pytest.approx(case["value_clip_fraction"], rel=1e-5)
    assert 0 < case["value_clip_fraction"] < 1


@pytest.mark.parametrize("case", PREFERENCES["preferences"], ids=lambda case: " ".join(f"{name}={value}" for name, value in case["settings"].items()))
def test_preference_losses_rewards_and_gradients_are_trls(case: dict[str, Any]) -> None:
    config = DPOConfig.model_validate(case["settings"])
    chosen, lengths = read(case, "chosen").requires_grad_(), (read(case, "chosen_lengths"), read(case, "rejected_lengths"))
    policy = PairLogprobs(chosen, read(case, "rejected"), *lengths)
    reference = PairLogprobs(read(case, "reference_chosen"), read(case, "reference_rejected"), *lengths)
    losses, *rewards = PREFERENCE_LOSSES[config.loss](policy, reference, config)
    losses.mean().backward()
    for found, name in zip((losses, *rewards, chosen.grad), ("losses", "chosen_rewards", "rejected_rewards", "gradient"), strict=True):
        torch.testing.assert_close(found, read(case, name), **CLOSE)


@pytest.mark.parametrize("case", PREFERENCES["ranking"], ids=["plain", "margin"])
def test_bradley_terry_and_its_gradient_are_trls(case: dict[str, Any]) -> None:
    chosen = read(case, "chosen").requires_grad_()
    loss = log_odds_loss(chosen - read(case, "rejected") - read(case, "margin")).mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(chosen.grad, read(case, "gradient"), **CLOSE)
