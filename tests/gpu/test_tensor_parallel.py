"""One generator over two GPUs: weights reach both parts, and both compute with them."""

from pathlib import Path

import pytest

from .common import GREEDY, PROMPTS, published, started_over_two, tokens, two_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.ray, two_gpus]


@pytest.mark.parametrize("sleep", [False, True])
def test_both_parts_compute_with_the_published_weights(ray_cluster: None, model: Path, sleep: bool) -> None:
    with started_over_two(model, sleep) as generator:
        for version in (1, 2):
            generator.receive(published(model, version))
            assert generator.received[0].version == version
            first, second = (generator.generate(PROMPTS, GREEDY) for _ in range(2))
            assert tokens(first) == tokens(second)
