import pytest
import torch

from minigpt_ray.rl.rewards import combine, token_rewards

NAN = float("nan")


def test_the_score_arrives_after_the_last_response_token_and_the_penalty_after_each() -> None:
    mask = torch.tensor([[False, True, True, False], [False, True, False, True], [False, False, False, False]])
    kl = torch.tensor([[NAN, 0.5, -1.0, NAN], [NAN, 2.0, NAN, 0.0], [NAN, NAN, NAN, NAN]])
    rewards = token_rewards(torch.tensor([1.0, 3.0, NAN]), kl, 0.1, mask)
    expected = torch.tensor([[0.0, -0.05, 1.1, 0.0], [0.0, -0.2, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(rewards, expected)


def test_token_rewards_add_up_to_score_minus_penalty() -> None:
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.6
    mask[:, 3] = True
    scores, kl = torch.randn(5), torch.randn(5, 7)
    expected = scores - 0.3 * torch.where(mask, kl, 0).sum(1)
    assert torch.allclose(token_rewards(scores, kl, 0.3, mask).sum(1), expected, atol=1e-6)


def test_the_total_is_the_weighted_sum_of_the_sources_and_zero_where_one_failed() -> None:
    by_source = {"verifier": torch.tensor([1.0, 0.0, NAN]), "length": torch.tensor([4.0, 2.0, 1.0])}
    rewards = combine(by_source, {"verifier": 1.0, "length": -0.5}, torch.tensor([False, False, True]))
    assert rewards.total.tolist() == [-1.0, -1.0, 0.0]
    assert rewards.by_source is by_source and rewards.failed.tolist() == [False, False, True]


def test_a_source_without_a_weight_is_an_error() -> None:
    with pytest.raises(KeyError, match="judge"):
        combine({"judge": torch.ones(1)}, {}, torch.tensor([False]))
