"""What the supervised stages and the bare loop read: a run directory with documents, demonstrations and pairs of words.

Random, but of the lengths that short chats have; what is learnt makes no difference to how long a step takes.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.inputs import words_tokenizer
from minigpt_ray.models import build_causal, export

PRESET = "qwen3-1m"
WORDS = 700
ROWS = 3000


def write_inputs(directory: Path, preset: str = PRESET, rows: int = ROWS) -> None:
    """<directory>/prepare_data with a file for each kind of stage, and <directory>/start/model."""
    tokenizer, random = words_tokenizer(), np.random.default_rng(0)
    data = directory / "prepare_data"
    data.mkdir(parents=True)
    export(build_causal(preset, tokenizer, seed=0), tokenizer, directory / "start" / "model")

    def words(low: int, high: int) -> str:
        return "".join(f" {number}" for number in random.integers(0, WORDS, random.integers(low, high)))

    def said(low: int, high: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": words(8, 24)}, {"role": "assistant", "content": words(low, high)}]

    kinds = {
        "documents": lambda: {"text": words(20, 400)},
        "demonstrations": lambda: {"messages": said(16, 80)},
        "preferences": lambda: {"prompt": words(8, 24), "chosen": words(16, 60), "rejected": words(16, 60)},
    }
    for name, row in kinds.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(rows)), encoding="utf-8")
