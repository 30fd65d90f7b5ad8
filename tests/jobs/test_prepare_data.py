"""The data of a run: disjoint sets that train and verify, written whole or not at all; and --check."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.prepare_data import main
from minigpt_ray.config import PromptsConfig
from minigpt_ray.data.packing import pack
from minigpt_ray.data.prompts import load_prompts
from minigpt_ray.data.rows import read_rows
from minigpt_ray.data.verification import verify
from minigpt_ray.tokenizer import encode_conversation, load_tokenizer

SMALL = ["demonstrations=12", "prompts=20", "held_out=6", "tasks={chain_sum: {weight: 1, options: {max_terms: 2}}, spell_backward: {}}"]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    assert main([f"output_dir={tmp_path}", *SMALL]) == 0
    return tmp_path / "debug" / "prepare_data"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_sets_are_read_by_those_who_train_and_share_no_question(prepared: Path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    demonstrations = list(read_rows([prepared / "demonstrations.jsonl"]))
    prompts = load_prompts(PromptsConfig(), prepared / "prompts.jsonl", tokenizer)
    held_out = load_prompts(PromptsConfig(), prepared / "held_out.jsonl", tokenizer)
    questions = [rows.messages[0]["content"] for part in (demonstrations, prompts.prompts, held_out.prompts) for rows in part]
    assert len(set(questions)) == len(questions) == 12 + 20 + 6
    for prompt in (*prompts.prompts, *held_out.prompts):
        assert prompt.answer is not None
        assert verify(prompt.answer, prompt.answer["answer"]) == 1.0
    assert pack([encode_conversation(tokenizer, row.messages) for row in demonstrations], 128).loss_mask.any()


def test_the_manifest_has_config_counts_and_hashes(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["counts"]["prompts"] == {"chain_sum": 10, "spell_backward": 10}
    assert manifest["config"]["tasks"]["chain_sum"]["options"] == {"max_terms": 2}
    assert manifest["sha256"].keys() == contents(prepared).keys() - {"manifest.json"}
    assert len(manifest["sha256"]["prompts.jsonl"]) == 64


def test_the_same_config_gives_the_same_bytes_and_is_done_once(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(prepared)
    assert main([f"output_dir={tmp_path}", *SMALL]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([f"output_dir={tmp_path}", "run=again", *SMALL]) == 0
    assert contents(tmp_path / "again" / "prepare_data") == before == contents(prepared)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["prepare_data"]


def test_another_config_does_not_overwrite_and_is_told_what_differs(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(prepared)
    assert main([f"output_dir={tmp_path}", *SMALL, "prompts=21"]) == 2
    assert "was made by another config (prompts: 20 then, 21 now); choose another run=" in capsys.readouterr().err
    assert contents(prepared) == before


@pytest.mark.parametrize(
    ("damage", "message"), [("changed", "held_out.jsonl is changed"), ("missing", "held_out.jsonl is missing"), ("manifest", "without a manifest.json")]
)
def test_damaged_data_is_not_reused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str) -> None:
    file = prepared / ("manifest.json" if damage == "manifest" else "held_out.jsonl")
    if damage == "changed":
        file.write_text(file.read_text() + "\n")
    else:
        file.unlink()
    assert main([f"output_dir={tmp_path}", *SMALL]) == 2
    assert message in capsys.readouterr().err


def test_a_task_without_reference_answers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output_dir={tmp_path}", "demonstrations=1", "prompts=1", "held_out=1", "tasks={graph_color: {}}"]) == 2
    assert "tasks.graph_color: the task gives no reference answer" in capsys.readouterr().err
    assert not (tmp_path / "debug" / "prepare_data").exists()


def file_of(tmp_path: Path, *lines: Any) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_check_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, {"question": "q", "answer": "a"}, {"question": "qqq", "answer": "a #### 3", "source": "x"})
    assert main(["--check", path]) == 0
    out = capsys.readouterr().out
    for expected in ("2 rows", "format 'question and answer'", "question", "str 2", "source", "data", "bytes", "demonstration", "first row"):
        assert expected in out
    assert "usable: prompts for PPO and evaluation; their answers can be verified; demonstrations for SFT" in out


def test_check_counts_tokens_and_cuts_at_the_separator(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, {"text": "q\na"}, {"text": "q"})
    assert main(["--check", path, "--tokenizer", str(prepared / "tokenizer"), "--separator", "\\n"]) == 0
    out = capsys.readouterr().out
    assert "tokens" in out and "1 of 2 are demonstrations" in out and "0 of 2 answers can be verified" in out


def test_check_of_prepared_prompts_is_content(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(prepared / "prompts.jsonl")]) == 0
    assert "format 'prompt with entry'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "q"}', "{broken"], "data.jsonl:2: not JSON"),
        ([{"chosen": "a"}], "data.jsonl:1: the fields 'chosen' are no known format"),
        (
            [{"prompt": "q", "entry": {"question": "q", "answer": "a", "metadata": {"source_dataset": "nope"}}}],
            "data.jsonl:1: tasks.nope: reasoning-gym has no such",
        ),
        ([], "the file is empty"),
    ],
)
def test_check_ends_with_1_and_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Any], message: str) -> None:
    assert main(["--check", file_of(tmp_path, *lines)]) == 1
    assert message in capsys.readouterr().err


def test_check_refuses_a_missing_tokenizer_and_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, {"prompt": "q"})
    assert main(["--check", path, "--tokenizer", str(tmp_path / "nowhere")]) == 1
    assert "no tokenizer at" in capsys.readouterr().err
    assert main(["--check", path, "prompts=3"]) == 2
    assert "--check reads one file and no config" in capsys.readouterr().err


def test_the_command_line_explains_itself() -> None:
    result = subprocess.run([sys.executable, "-m", "jobs.prepare_data", "--help"], capture_output=True, text=True, check=True)
    for expected in ("--check FILE", "--tokenizer DIR", "tokenizer.vocab_size"):
        assert expected in result.stdout
