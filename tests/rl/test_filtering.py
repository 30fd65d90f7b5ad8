"""A group teaches something when two of its rewards differ."""

import torch

from minigpt_ray.rl.filtering import with_signal


def test_groups_whose_rewards_differ_have_signal_wherever_their_rows_stand() -> None:
    groups = torch.tensor([7, 3, 7, 3, 9, 9])
    rewards = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0, 0.0])
    assert with_signal(rewards, torch.zeros(6, dtype=torch.bool), groups).tolist() == [False, True, False, True, False, False]


def test_a_rollout_without_a_score_is_no_difference() -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    failed = torch.tensor([False, True, False, False, True, True])
    assert with_signal(rewards, failed, groups).tolist() == [False, False, True, True, False, False]
