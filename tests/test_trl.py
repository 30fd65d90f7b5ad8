"""Advantages, whitening and losses of PPO are those of TRL's own functions (tests/golden/make_trl_ppo.py says how the table was made)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt_ray.losses import Loss, clipped_policy_loss, clipped_value_loss
from minigpt_ray.rl.advantages import EstimatorInputs, gae, whiten

CASES = json.loads((Path(__file__).parent / "golden" / "trl_ppo.json").read_text())["cases"]
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
