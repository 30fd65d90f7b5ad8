"""What a user can mend is refused with code 2 and one sentence on stderr, before torch is imported and anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "transformers", "vllm", "deepspeed"} & set(sys.modules)
"""
"""`python -m`, which would not have known that nothing heavy was imported."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with a run that has a model, as far as anybody looks before torch, and a malformed line among its prompts."""
    directory = tmp_path_factory.mktemp("home")
    prepared, model = directory / "broken" / "prepare_data", directory / "broken" / "sft" / "model"
    for path in (prepared, model):
        path.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    row = json.dumps({"prompt": "what is 1 + 1?", "answer": "2"})
    (prepared / "prompts.jsonl").write_text(f"{row}\n{{broken\n")
    (prepared / "held_out.jsonl").write_text(f"{row}\n")
    return directory


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("jobs.ppo configs/debug/ppo.yaml run=none", "init_from='sft' is neither a finished stage of this run"),
        ("jobs.ppo configs/debug/ppo.yaml run=broken", "prepare_data/prompts.jsonl:2: not JSON"),
        ("jobs.sft configs/debug/sft.yaml run=none", "run python -m jobs.prepare_data run=none"),
        ("jobs.sft configs/debug/sft.yaml stepz=3", "stepz: unknown field, did you mean steps?"),
        ("jobs.dpo configs/debug/dpo.yaml run=broken", "prepare_data/preferences.jsonl; run python -m jobs.prepare_data run=broken"),
        ("jobs.evaluate configs/debug/evaluate.yaml run=broken models=[sft,dpo]", "init_from='dpo' is neither a finished stage of this run"),
        ("jobs.generate_preferences configs/debug/generate_preferences.yaml run=broken", "prepare_data/prompts.jsonl:2: not JSON"),
        ("jobs.serve_reward model=nowhere", "init_from='nowhere' is neither a finished stage of this run"),
    ],
)
def test_it_is_one_sentence_and_torch_is_not_imported(home: Path, words: str, sentence: str) -> None:
    command = [sys.executable, "-c", PROGRAM, *words.split(), f"output_dir={home}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in home.iterdir()) == ["broken"]
