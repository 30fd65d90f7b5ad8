"""What a job of a test begins with."""

import shutil
from pathlib import Path

from jobs.prepare_data import main as prepare_data
from minigpt_ray.models import build_causal, export
from minigpt_ray.tokenizer import load_tokenizer

CHECKOUT = Path(__file__).parents[2]


def random_start(output_dir: Path, run: str, *copies: str) -> None:
    """A run that has been through prepare_data in debug mode, and whose SFT learnt nothing; and copies of it."""
    assert prepare_data([str(CHECKOUT / "configs/debug/prepare_data.yaml"), f"output_dir={output_dir}", f"run={run}"]) == 0
    tokenizer = load_tokenizer(output_dir / run / "prepare_data" / "tokenizer")
    export(build_causal("nano", tokenizer, seed=0), tokenizer, output_dir / run / "sft" / "model")
    for copy in copies:
        shutil.copytree(output_dir / run, output_dir / copy)
