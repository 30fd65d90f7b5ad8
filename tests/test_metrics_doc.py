"""docs/metrics.md says what every metric is: by hand-kept rows, held to the names that the code emits."""

import re
from pathlib import Path

import pytest
import torch

from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.evaluation import evaluation_metrics
from minigpt_ray.losses import clipped_value_loss, policy_loss
from minigpt_ray.rl.experience import Experience
from minigpt_ray.tracking import Rates

FIXED = [
    "train/actor_loss",
    "train/critic_loss",
    "train/reward",
    "train/kl",
    "train/kl_ref",
    "train/avg_response_len",
    "train/actor_lr",
    "train/critic_lr",
    "train/actor_grad_norm",
    "train/critic_grad_norm",
    "train/epoch",
    "train/global_step",
    "train/tokens_per_second",
    "train/samples_per_second",
    "train/steps_per_second",
    "train/num_tokens_generated",
    "train/mfu_percent",
    "train/eta_minutes",
    "system/epoch_time",
]

TEXT = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
ROWS = {
    cells[0].strip("`"): cells[1:]
    for cells in ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in TEXT.splitlines() if line.startswith("| `"))
}


def documented(name: str) -> bool:
    """The name has a row, or a row with a <placeholder> matches it, or it is the running average of a rate."""
    patterns = [re.sub("<.*?>", ".+", re.escape(row)) for row in ROWS]
    return any(re.fullmatch(pattern, name) for pattern in patterns) or f"`{name}`" in TEXT


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_name_has_a_row_with_formula_unit_tokens_and_window(name: str) -> None:
    assert len(ROWS[name]) == 4 and all(ROWS[name])


def test_every_row_is_complete_and_unique() -> None:
    assert all(len(cells) == 4 and all(cells) for cells in ROWS.values())
    assert len(ROWS) == sum(line.startswith("| `") for line in TEXT.splitlines())


def test_the_fixed_names_come_first_and_in_their_order() -> None:
    order = list(ROWS)
    assert set(order[: len(FIXED)]) == set(FIXED)


def test_rates_and_evaluations_are_documented() -> None:
    rates = Rates(last_step=2, peak_flops=1.0).step(1, 1.0, 1, 1, 1.0)
    evaluations = [f"eval/{prefix}{name.removeprefix('eval/')}" for prefix in ("", "sampled_") for name in evaluation_metrics([], [], [])]
    assert not [name for name in [*rates, *evaluations] if not documented(name)]


def test_statistics_of_the_losses_are_documented() -> None:
    x, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    experience = Experience(mask.int(), torch.ones(1, dtype=torch.int32), mask, x, x, x, x, x, kl_coef=0.1, step=0)
    policy = policy_loss(x, x, experience, 1, AlgorithmConfig(dual_clip=3, kl_in="loss", kl_estimator="k2")).stats
    value = clipped_value_loss(x, x, x, mask, 1, 0.2).stats
    names = {*(f"policy/{name}" for name in policy), *(f"critic/{name}" for name in value)}
    renamed = {"policy/actor_loss": "train/actor_loss", "policy/kl": "train/kl", "critic/critic_loss": "train/critic_loss"}
    assert all(documented(renamed.get(name, name)) for name in names)
