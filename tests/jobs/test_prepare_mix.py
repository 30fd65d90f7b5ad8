"""A mix of sources becomes the files that the stages read, written whole or not at all; --check of pairs, text and Parquet."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from jobs.prepare_data import main
from minigpt_ray.config import PromptsConfig
from minigpt_ray.data.prompts import load_prompts
from minigpt_ray.data.rows import read_rows
from minigpt_ray.data.verification import verify
from minigpt_ray.tokenizer import encode_conversation, load_tokenizer
from tests.data.test_duplicates import prose


@pytest.fixture
def mix(tmp_path: Path) -> list[str]:
    """Command line of a mix of all kinds, in two files that are given together."""
    lines(tmp_path / "maths.jsonl", *({"question": f"{prose(40, n)} {n}?", "answer": f"{prose(30, n)}\n#### {n}"} for n in range(60)))
    lines(tmp_path / "pairs.jsonl", *({"prompt": prose(40, 100 + n), "chosen": prose(30, n), "rejected": prose(30, 50 + n)} for n in range(40)))
    (tmp_path / "plays.txt").write_text("\n\n".join(prose(200, 200 + n) for n in range(40)))
    (tmp_path / "base.yaml").write_text(
        f"documents: {{sources: {{plays: {{kind: file, files: ['{tmp_path}/*.txt'], cut_at: \"\\n\\n\"}}}}}}\ntokenizer: {{vocab_size: 300}}"
    )
    (tmp_path / "more.yaml").write_text(
        f"""
demonstrations: {{sources: {{maths: {{kind: file, files: [{tmp_path}/maths.jsonl]}}}}}}
preferences: {{sources: {{own: {{kind: file, files: [{tmp_path}/pairs.jsonl]}}}}}}
prompts:
  sources:
    maths: {{kind: file, files: [{tmp_path}/maths.jsonl]}}
    sums: {{kind: task, task: chain_sum, count: 20}}
held_out: 0.2
"""
    )
    return [str(tmp_path / "base.yaml"), str(tmp_path / "more.yaml"), f"output_dir={tmp_path}", "run=mix"]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def values(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read_by_the_stages_and_written_the_same_again(mix: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(mix) == 0
    written = tmp_path / "mix" / "prepare_data"
    kinds = ("documents", "demonstrations", "preferences", "prompts", "held_out_documents", "held_out_demonstrations", "held_out_preferences", "held_out")
    assert {path.name for path in written.iterdir()} == {*(f"{kind}.jsonl" for kind in kinds), "tokenizer", "summary.svg", "manifest.json"}

    tokenizer = load_tokenizer(written / "tokenizer")
    for row in read_rows([written / "demonstrations.jsonl", written / "held_out_demonstrations.jsonl"]):
        assert row.is_demonstration and encode_conversation(tokenizer, row.messages).loss_mask.any()
    for name in ("prompts", "held_out"):
        for prompt in load_prompts(PromptsConfig(), written / f"{name}.jsonl", tokenizer).prompts:
            assert prompt.answer is not None and verify(prompt.answer, str(prompt.answer["answer"])) == 1
    for value in values(written / "preferences.jsonl"):
        assert [[turn["role"] for turn in value[name]] for name in ("prompt", "chosen", "rejected")] == [["user"], ["assistant"], ["assistant"]]
        assert value["source"] == "own"
    assert all(value.keys() == {"text", "source"} for value in values(written / "documents.jsonl"))
    questions = {row.messages[0]["content"] for name in ("demonstrations", "prompts") for row in read_rows([written / f"{name}.jsonl"])}
    assert not questions & {row.messages[0]["content"] for name in ("held_out_demonstrations", "held_out") for row in read_rows([written / f"{name}.jsonl"])}

    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["counts"] == {kind: manifest["counts"][kind] for kind in manifest["counts"]} and manifest["counts"]["documents"].keys() == {"plays"}
    assert sum(manifest["counts"]["demonstrations"].values()) == len(values(written / "demonstrations.jsonl"))
    assert manifest["config"]["held_out"] == 0.2 and manifest["inputs"].keys() == {str(tmp_path / name) for name in ("plays.txt", "maths.jsonl", "pairs.jsonl")}
    assert manifest["sources"]["prompts.sources.sums"]["read"] == 20
    assert manifest["sha256"].keys() == contents(written).keys() - {"manifest.json"}
    picture = ElementTree.parse(written / "summary.svg").getroot()
    assert picture.tag.endswith("svg") and "preferences: own" in "".join(picture.itertext())
    out = capsys.readouterr().out
    assert all(word in out for word in ("documents", "plays", "sums", "held out", "share"))

    assert main(mix) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*mix, "run=again"]) == 0
    assert contents(tmp_path / "again" / "prepare_data") == contents(written)


def test_other_inputs_and_another_config_are_told_apart(mix: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = [mix[0], *mix[2:]]
    assert main(mix) == 0
    assert main([*mix, "held_out=0.1"]) == 2
    assert "was made by another config (held_out: 0.02 then, 0.1 now); choose another run=" in capsys.readouterr().err
    (tmp_path / "plays.txt").write_text("something else")
    assert main(mix) == 2
    assert f"{tmp_path / 'plays.txt'} is not what it was when" in capsys.readouterr().err


def test_a_run_that_fails_leaves_nothing_that_looks_whole_and_the_next_one_works(mix: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = [mix[1], *mix[2:]]
    good = (tmp_path / "pairs.jsonl").read_text()
    lines(tmp_path / "pairs.jsonl", good.rstrip(), '{"prompt": "q", "chosen": "a"}')
    assert main(mix) == 2
    assert "pairs.jsonl:41: field 'rejected' is missing, found 'prompt', 'chosen'; expected the format 'prompt, chosen and rejected'" in capsys.readouterr().err
    assert not list((tmp_path / "mix").iterdir())
    killed = tmp_path / "mix" / ".prepare_data.unfinished" / "spool"
    killed.mkdir(parents=True)
    (tmp_path / "pairs.jsonl").write_text(good)
    assert main(mix) == 0
    assert [path.name for path in (tmp_path / "mix").iterdir()] == ["prepare_data"]


def test_a_missing_file_is_refused_before_anything_is_read(mix: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").unlink()
    assert main(mix) == 2
    assert "preferences.sources.own.files:" in capsys.readouterr().err
    assert not (tmp_path / "mix").exists()


def test_dry_run_and_mistakes_are_those_of_a_mix(mix: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*mix, "--dry-run"])
    assert end.value.code == 0 and "near_duplicates: 0.8" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([*mix, "demonstrations.sources.maths.kind=web"])
    assert end.value.code == 2 and "demonstrations.sources.maths.kind=web: unknown; one of file, hub, task is needed" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], "prompt, chosen and rejected"),
        ([{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}], "chosen and rejected"),
        (
            [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}],
            "prompt with scored responses",
        ),
    ],
)
def test_check_says_what_pairs_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], format: str) -> None:
    assert main(["--check", str(lines(tmp_path / "a.jsonl", *rows))]) == 0
    out = capsys.readouterr().out
    assert f"1 rows, format '{format}'" in out and "chosen, with its prompt" in out
    assert "usable: pairs for DPO and reward models" in out and ("1 rows whose answers are equally good are left out" in out) == (len(rows) == 2)


def test_check_refuses_pairs_without_a_difference_and_names_bad_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(lines(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "a"}))]) == 1
    assert "in each of 1 rows the answers are equally good" in capsys.readouterr().err
    assert main(["--check", str(lines(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": 3}))]) == 1
    assert "a.jsonl:1: field 'rejected' is a number (3); expected text" in capsys.readouterr().err


def test_check_reads_text_parquet_and_conversations_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text")
    parquet.write_table(pa.table({"instruction": ["q"], "output": ["a"]}), tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    for name, expected in (("a.txt", "format 'text'"), ("a.parquet", "format 'alpaca'"), ("a.jsonl", "format 'ShareGPT'")):
        assert main(["--check", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert expected in out and ("documents for a mix" in out) == (name == "a.txt")
