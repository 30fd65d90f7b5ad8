"""Near duplicates: the estimate is the Jaccard similarity, and every similar pair is found."""

from pathlib import Path

import numpy as np
import pytest

from minigpt_ray.data.duplicates import Clusters, Signatures, first_of_each, join, normalised, repetition, signature

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz      "))


def prose(size: int, seed: int) -> str:
    """Text that does not repeat itself."""
    return "".join(np.random.default_rng(seed).choice(LETTERS, size))


def windows(text: str) -> set[bytes]:
    """Its runs of 8 bytes."""
    raw = text.encode()
    return {raw[i : i + 8] for i in range(max(1, len(raw) - 7))}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the sets of runs of 8 bytes."""
    return len(windows(one) & windows(other)) / len(windows(one) | windows(other))


def compared(path: Path, texts: list[str], groups: list[int] | None = None) -> Clusters:
    signatures = Signatures(path)
    for text in texts:
        signatures.append(signature(text))
    return signatures.clusters(0.8, np.array(groups or [0] * len(texts), np.int64))


@pytest.mark.parametrize("size", [30, 100, 1000, 8000, 9000, 30000])
def test_signatures_estimate_the_similarity_without_bias(size: int) -> None:
    errors = []
    for seed in range(40):
        text = normalised(prose(2 * size, seed))
        one, other = text[:size], text[seed * size // 60 :][:size]
        errors.append((signature(one) == signature(other)).mean() - similarity(one, other))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06


def test_equal_texts_have_equal_signatures_and_short_ones_are_texts_too() -> None:
    for text in ("", "a", "1234567", "12345678", "é", "日本語の文章"):
        assert (signature(text) == signature(text)).all()
    assert (signature("a") != signature("b")).any()
    assert normalised(" Two\n words\t") == normalised("two WORDS")


def test_similar_pairs_are_found_and_others_are_not(tmp_path: Path) -> None:
    texts = [prose(2000, seed) for seed in range(100)]
    similar = [text[:-60] for text in texts]  # 0.97
    half = [text[:1000] + prose(1000, 1000 + n) for n, text in enumerate(texts)]  # 0.33
    found = compared(tmp_path / "s", [*texts, *similar, *half])
    assert found.near.tolist() == found.akin.tolist() == [*range(100), *range(100), *range(200, 300)]


def test_what_is_akin_is_somewhat_less_similar(tmp_path: Path) -> None:
    texts = [prose(2000, seed) for seed in range(40)]
    found = compared(tmp_path / "s", [*texts, *(text[:1500] for text in texts)])  # 0.75
    assert (found.near[40:] != np.arange(40)).mean() > 0.75 and (found.akin[40:] == np.arange(40)).mean() > 0.75


def test_groups_are_not_compared(tmp_path: Path) -> None:
    assert compared(tmp_path / "s", [prose(500, 0)] * 4, [0, 1, 0, 1]).near.tolist() == [0, 1, 0, 1]


def test_a_bucket_of_many_unlike_texts_is_searched(tmp_path: Path) -> None:
    """They share a long beginning, so that all of them agree in some band, and fall into pairs by the rest."""
    beginning = prose(1000, 0)
    texts = [beginning + prose(1200, 1 + n // 2) + str(n) for n in range(40)]
    assert compared(tmp_path / "s", texts).near.tolist() == [n // 2 * 2 for n in range(40)]


def test_no_texts_make_no_clusters(tmp_path: Path) -> None:
    assert len(compared(tmp_path / "s", []).near) == 0


def test_clusters_are_the_components_of_a_graph() -> None:
    pairs, expected = np.random.default_rng(0).integers(0, 200, (150, 2)), list(range(200))
    for left, right in pairs.tolist():
        low, high = sorted((expected[left], expected[right]))
        expected = [low if label == high else label for label in expected]
    assert join(np.arange(200), pairs).tolist() == expected
    assert join(join(np.arange(200), pairs[:70]), pairs[70:]).tolist() == expected
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)[::-1]
    assert (join(np.arange(1000), chain) == 0).all()


def test_first_of_each() -> None:
    assert first_of_each(np.array([5, 3, 5, 3, 4], np.uint64)).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("short", 0.0, 0.0),
        (prose(5000, 0), 0.0, 0.001),
        (prose(50, 0) * 40, 0.95, 1.0),
        (prose(1000, 0) * 2, 0.45, 0.55),
        ("ha " * 200, 0.9, 1.0),
        ("これは同じ文です。" * 50, 0.9, 1.0),
        ("日本語の文章は空白で区切られないが、それでも繰り返しは数えられる。", 0.0, 0.0),
    ],
)
def test_repetition_is_the_share_that_was_there_before(text: str, low: float, high: float) -> None:
    assert low <= repetition(text) <= high
