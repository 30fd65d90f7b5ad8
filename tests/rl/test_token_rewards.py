import pytest
import torch

from minigpt_ray.rl.rewards import combine, length_penalties, merge_moments, normalize, token_rewards

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


def test_moments_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x = 1e3 + torch.randn(50)
    moments = (0, 0.0, 0.0)
    for part in (x[:1], x[1:1], x[1:20], x[20:]):
        moments = merge_moments(*moments, part)
    whole = x.double()
    assert moments == pytest.approx((50, float(whole.mean()), float((whole - whole.mean()).square().sum())), rel=1e-9)


def test_moments_by_hand() -> None:
    """1, 3, then 5: mean 3, squares 4 + 0 + 4."""
    assert merge_moments(*merge_moments(0, 0.0, 0.0, torch.tensor([1.0, 3.0])), torch.tensor([5.0])) == (3, 3.0, 8.0)


def test_normalised_by_its_own_moments_a_set_has_mean_zero_and_deviation_one_and_equal_numbers_are_zero() -> None:
    x = torch.tensor([1.0, 3.0, 8.0])
    found = normalize(x, *merge_moments(0, 0.0, 0.0, x))
    assert found.mean().item() == pytest.approx(0, abs=1e-6) and found.std(correction=0).item() == pytest.approx(1)
    same = torch.full((7,), 0.1)
    assert not normalize(same, *merge_moments(0, 0.0, 0.0, same)).any()


def test_tokens_beyond_the_free_ones_cost_wherever_they_stand() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert length_penalties(mask, 2, 0.5).tolist() == [[0, 0, 0, 0, 0.5, 0.5], [0] * 6, [0] * 6]
    assert length_penalties(mask, 0, 0.5).sum(1).tolist() == [2.0, 0.5, 0.0]


def test_a_row_pays_the_soft_overlong_punishment() -> None:
    """arXiv:2503.14476, eq. 13, for every length up to the longest."""
    longest, buffer = 20, 8
    mask = torch.arange(longest) < torch.arange(longest + 1)[:, None]
    expected = [0 if length <= longest - buffer else ((longest - buffer) - length) / buffer for length in range(longest + 1)]
    assert (-length_penalties(mask, longest - buffer, 1 / buffer).sum(1)).tolist() == expected
