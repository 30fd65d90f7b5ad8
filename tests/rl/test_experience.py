"""Rollouts become one padded table, an experience its rows; worked by hand."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from minigpt_ray.rl.experience import Experience, Prompt, RewardScores, Rollout, RolloutBatch, Scores


def rollout(serial: int, prompt: list[int], response: list[int], model: list[bool], finish_reason: str = "stop", valid: bool = True) -> Rollout:
    """Token i of the response has logprob -(i + 1) and weight version 10 + i."""
    size = len(response)
    return Rollout(
        prompt=Prompt(serial, ({"role": "user", "content": "?"},), np.array(prompt, np.int32), "source", None),
        sample=0,
        token_ids=np.array(response, np.int32),
        model_mask=np.array(model),
        logprobs=-np.arange(1, size + 1, dtype=np.float32),
        weight_versions=np.arange(10, 10 + size, dtype=np.int32),
        text="",
        finish_reason=finish_reason,
        valid=valid,
    )


ROLLOUTS = [
    rollout(7, [1, 2], [3, 4, 5], [True, True, True]),
    rollout(7, [1], [6], [True], "length"),
    rollout(8, [1, 2, 3], [4, 5, 6], [True, False, True]),  # the tool wrote the second token
    rollout(9, [9], [8, 7], [True, True], "length", valid=False),
]


def test_a_batch_by_hand() -> None:
    batch = RolloutBatch.of(ROLLOUTS)
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 0], [1, 6, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [9, 8, 7, 0, 0, 0]]
    assert batch.prompt_lengths.tolist() == [2, 1, 3, 1]
    assert batch.lengths.tolist() == [5, 2, 6, 3]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1], [0] * 6]
    assert batch.generator_logprobs.tolist() == [[0, 0, -1, -2, -3, 0], [0, -1, 0, 0, 0, 0], [0, 0, 0, -1, -2, -3], [0, -1, -2, 0, 0, 0]]
    assert batch.weight_versions.tolist() == [[0, 0, 10, 11, 12, 0], [0, 10, 0, 0, 0, 0], [0, 0, 0, 10, 11, 12], [0, 10, 11, 0, 0, 0]]
    assert batch.truncated.tolist() == [False, True, False, True]
    assert batch.groups.tolist() == [7, 7, 8, 9]
    assert len(batch) == 4


def test_an_invalid_rollout_keeps_its_row_and_counts_for_nothing() -> None:
    batch = RolloutBatch.of(ROLLOUTS)
    valid = RolloutBatch.of([replace(r, valid=True) for r in ROLLOUTS])
    assert not batch.response_mask[3].any() and valid.response_mask[3].sum() == 2
    assert torch.equal(batch.token_ids, valid.token_ids) and torch.equal(batch.lengths, valid.lengths)


def test_ids_are_int32_floats_float32_masks_bool() -> None:
    batch = RolloutBatch.of(ROLLOUTS)
    kinds = {field.name: getattr(batch, field.name).dtype for field in fields(batch)}
    assert kinds == {
        **dict.fromkeys(("token_ids", "prompt_lengths", "lengths", "groups", "weight_versions"), torch.int32),
        **dict.fromkeys(("response_mask", "truncated"), torch.bool),
        "generator_logprobs": torch.float32,
    }


def bytes_of(value: RolloutBatch | Experience, columns: int) -> int:
    """Bytes per token of what has one entry a token."""
    tensors = [getattr(value, field.name) for field in fields(value) if field.name != "step"]
    return sum(t.element_size() for t in tensors if t.ndim == 2 and t.shape[1] == columns)


def test_a_token_takes_thirteen_bytes_as_a_rollout_and_twenty_one_as_an_experience() -> None:
    """The padded entries of a batch; an experience has four floats, its ids and its mask."""
    batch = RolloutBatch.of(ROLLOUTS)
    assert bytes_of(batch, 6) == 4 + 1 + 4 + 4
    assert bytes_of(experience(), 6) == 4 + 1 + 4 * 4


def experience() -> Experience:
    batch = RolloutBatch.of(ROLLOUTS)
    cells = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return Experience(batch.token_ids, batch.lengths, batch.response_mask, cells, cells + 100, cells + 200, cells + 300, step=5)


def test_rows_are_cut_to_their_longest() -> None:
    rows = experience().rows(torch.tensor([3, 0]))
    assert rows.token_ids.tolist() == [[9, 8, 7, 0, 0], [1, 2, 3, 4, 5]]
    assert rows.lengths.tolist() == [3, 5]
    assert rows.response_mask.int().tolist() == [[0] * 5, [0, 0, 1, 1, 1]]
    assert rows.logprobs.tolist() == [[18, 19, 20, 21, 22], [0, 1, 2, 3, 4]]
    for name, offset in (("values", 100), ("advantages", 200), ("returns", 300)):
        assert torch.equal(getattr(rows, name), rows.logprobs + offset)
    assert (rows.step, len(rows)) == (5, 2)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [1], [3, 3]])
def test_rows_keep_dtypes_and_follow_the_index(order: list[int]) -> None:
    whole, rows = experience(), experience().rows(torch.tensor(order))
    for field in fields(whole):
        if field.name != "step":
            expected, found = getattr(whole, field.name), getattr(rows, field.name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected[order] if found.ndim == 1 else expected[order][:, : found.shape[1]])


def test_scores_of_chunks_join_in_order_and_rows_are_cut_from_them() -> None:
    def part(width: int, *rows: float) -> Scores:
        table = torch.tensor(rows)[:, None].expand(-1, width)
        rewards = RewardScores(torch.tensor(rows), {"a": torch.tensor(rows) * 10}, torch.tensor(rows) > 2)
        return Scores(table, table + 100, torch.tensor(rows)[:, None].expand(-1, width + 1), rewards)

    joined = Scores.join([part(2, 1.0, 2.0), part(3, 3.0)])
    assert joined.policy_logprobs.tolist() == [[1, 1, 0], [2, 2, 0], [3, 3, 3]]
    assert joined.reference_logprobs.tolist() == [[101, 101, 0], [102, 102, 0], [103, 103, 103]]
    assert joined.values.tolist() == [[1, 1, 1, 0], [2, 2, 2, 0], [3, 3, 3, 3]]
    assert joined.rewards.by_source["a"].tolist() == [10, 20, 30] and joined.rewards.failed.tolist() == [False, False, True]
    chosen = joined.rows(torch.tensor([2, 0]), width=2)
    assert chosen.policy_logprobs.tolist() == [[3, 3], [1, 1]] and chosen.values.tolist() == [[3, 3, 3], [1, 1, 1]]
    assert chosen.rewards.total.tolist() == [3, 1] and chosen.rewards.failed.tolist() == [True, False]
