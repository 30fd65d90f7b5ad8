"""Packing loses nothing, keeps examples apart, and every rank knows its windows."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from minigpt_ray.data.packing import Group, pack, pack_groups, split, window_order, windows_at
from minigpt_ray.tokenizer import Example


def example(*token_ids: int) -> Example:
    return Example(np.array(token_ids, np.int32), np.ones(len(token_ids), bool))


def random_examples(seed: int, count: int, longest: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [Example(generator.integers(1, 100, n).astype(np.int32), generator.random(n) < 0.5) for n in lengths]


def test_longest_first_into_the_tightest_window() -> None:
    windows = pack([example(1), example(2, 3, 4), example(5, 6), example(7, 8, 9, 10)], window=5)
    assert windows.token_ids.tolist() == [[7, 8, 9, 10, 1], [2, 3, 4, 5, 6]]
    assert windows.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert windows.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]


def test_padding_is_a_segment_of_its_own_without_loss() -> None:
    windows = pack([example(5, 6)], window=5)
    assert windows.token_ids.tolist() == [[5, 6, 0, 0, 0]]
    assert windows.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert windows.loss_mask.tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_found_whole_exactly_once(seed: int) -> None:
    examples = random_examples(seed, 200, 32)
    windows = pack(examples, 32)
    found = []
    for ids, mask, positions in zip(windows.token_ids, windows.loss_mask, windows.position_ids, strict=True):
        for segment in np.split(np.arange(32), np.flatnonzero(positions == 0)[1:]):
            if ids[segment].any():  # no example here holds token 0
                found.append((ids[segment].tolist(), mask[segment].tolist()))
    assert sorted(found) == sorted((ids.tolist(), [False, *mask[1:].tolist()]) for ids, mask in examples)


def test_packing_wastes_little() -> None:
    examples = random_examples(0, 500, 32)
    tokens = sum(len(ids) for ids, _ in examples)
    assert len(pack(examples, 128)) == -(-tokens // 128)


def test_example_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="example 1 has 4 tokens, but window=3; use a window of at least 5"):
        pack([example(1), example(1, 2, 3, 4), example(1, 2, 3, 4, 5)], window=3)


def test_packed_examples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=100, **shape)).eval()
    examples = random_examples(1, 6, 7)
    windows = pack(examples, 16)
    logits = model(torch.tensor(windows.token_ids).long(), position_ids=torch.tensor(windows.position_ids).long(), use_cache=False).logits
    for ids, _ in examples:
        alone = model(torch.tensor(ids).long()[None], use_cache=False).logits[0]
        starts = [(r, c) for r in range(len(windows)) for c in range(17 - len(ids)) if windows.token_ids[r, c : c + len(ids)].tolist() == ids.tolist()]
        assert any(torch.allclose(logits[r, c : c + len(ids)], alone, atol=1e-5) for r, c in starts if windows.position_ids[r, c] == 0)


def test_window_order_is_a_new_permutation_every_epoch() -> None:
    first, second = window_order(50, seed=3, epoch=0), window_order(50, seed=3, epoch=1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert first.tolist() == window_order(50, seed=3, epoch=0).tolist()


def test_an_endless_reading_has_every_window_once_an_epoch_wherever_it_is_cut() -> None:
    read = windows_at(np.arange(48), num_windows=12, seed=5)
    assert [sorted(epoch) for epoch in read.reshape(4, 12)] == [list(range(12))] * 4
    assert read[:12].tolist() == window_order(12, 5, 0).tolist()
    assert np.concatenate([windows_at(places, 12, seed=5) for places in np.split(np.arange(48), 6)]).tolist() == read.tolist()


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 7, 13, 40])
def test_split_and_packed_every_token_but_the_first_is_learnt_once(length: int) -> None:
    pieces = split(example(*range(1, length + 1)), window=5)
    assert all(1 <= len(ids) <= 5 for ids, _ in pieces)
    windows = pack(pieces, 5)
    assert sorted(windows.token_ids[windows.loss_mask].tolist()) == list(range(2, length + 1))


def test_the_segments_of_a_group_share_a_window_and_its_numbers_stand_at_its_first_token() -> None:
    groups = [Group((example(1, 2), example(3, 4, 5)), {"margin": 0.5}), Group((example(6), example(7, 8)), {"margin": 2.0})]
    windows = pack_groups(groups, 9)
    assert windows.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0]]
    assert windows.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1, 0]]
    assert windows.numbers["margin"].tolist() == [[0.5, 0, 0, 0, 0, 2.0, 0, 0, 0]]
