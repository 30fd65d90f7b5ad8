"""Which answers make a pair, by hand; and files that are whole, share no prompt and know by which configuration they were made."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minigpt_ray.cli import ConfigError, read_config
from minigpt_ray.config import GeneratePreferencesConfig, GeneratorConfig, PromptsConfig
from minigpt_ray.data.preferences import COUNTED, Answer, Answers, PairFile, is_held_out, load_right_answers, make_pairs
from minigpt_ray.data.prompts import load_prompts
from minigpt_ray.data.rows import DataError
from minigpt_ray.rl.experience import Prompt
from minigpt_ray.tokenizer import END, encode_conversation, train_tokenizer

NAN = math.nan


def prompt(serial: int = 0, text: str = "2 + 2?") -> Prompt:
    return Prompt(serial, ({"role": "user", "content": text},), np.array([1], np.int32), "sums", {"answer": "4"})


def answer(text: str, score: float, verified: float = 0.0, finished: bool = True) -> Answer:
    return Answer(text, score, verified, finished)


def pairs(*sampled: Answer, right: Answer | None = None, serial: int = 0, **settings: object) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Chosen and rejected texts of one prompt, and the counts."""
    rows, counts = make_pairs(Answers(prompt(serial), sampled, right), GeneratePreferencesConfig.model_validate(settings), [END])
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows], counts


def test_best_and_worst_are_a_pair_and_equals_are_none() -> None:
    assert pairs(answer("a", 0.5), answer("b", 1.0), answer("c", 0.0), answer("d", 1.0))[0] == [("b", "c")]
    made, counts = pairs(answer("a", 0.5), answer("b", 0.5))
    assert made == [] and (counts["prompts"], counts["prompts without a pair"], counts["pairs"]) == (1, 1, 0)
    assert pairs(answer("a", 0.5), answer("b", 0.6), min_margin=0.2)[0] == []


def test_a_row_has_messages_source_and_both_scores() -> None:
    ((row,), _) = make_pairs(Answers(prompt(), (answer("4", 1.0), answer("5", 0.25)), None), GeneratePreferencesConfig(), [])
    assert row == {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "5"}],
        "source": "sums",
        "chosen_score": 1.0,
        "rejected_score": 0.25,
    }


def test_all_pairs_are_those_with_different_scores_and_at_most_so_many() -> None:
    three = (answer("a", 0.0), answer("b", 1.0), answer("c", 1.0))
    assert pairs(*three, strategy="all_pairs")[0] == [("b", "a"), ("c", "a")]
    many = [answer(str(i), float(i)) for i in range(8)]
    drawn = pairs(*many, strategy="all_pairs", max_pairs_per_prompt=5)[0]
    assert len(set(drawn)) == 5 and all(float(chosen) > float(rejected) for chosen, rejected in drawn)
    assert pairs(*many, strategy="all_pairs", max_pairs_per_prompt=5)[0] == drawn  # the seed and the prompt decide
    assert (
        pairs(*many, strategy="all_pairs", max_pairs_per_prompt=5, serial=1)[0]
        != drawn
        != pairs(*many, strategy="all_pairs", max_pairs_per_prompt=5, seed=1)[0]
    )


def test_what_cannot_be_learnt_from_is_left_out_and_counted() -> None:
    made, counts = pairs(answer("a", NAN), answer(" ", 2.0), answer(f"x{END}", 3.0), answer("b", 0.5), answer("b ", 0.5), answer("c", 9.0, finished=False))
    assert made == []  # what was cut is not chosen
    assert {name: counts[name] for name in COUNTED if name.startswith("answers")} == {
        "answers": 6,
        "answers cut at the length limit": 1,
        "answers without a score": 1,
        "answers blank or with a special token": 2,
        "answers that repeat another": 1,
    }
    assert pairs(answer("b", 0.5), answer("c", 0.0, finished=False))[0] == [("b", "c")]  # but may be rejected


def test_the_right_answer_is_paired_with_a_wrong_one() -> None:
    right = answer("4", 1.0, 1.0)
    made, counts = pairs(answer("4", 1.0, 1.0), answer("four", 1.0, 1.0), answer("5", 0.0), right=right, strategy="none", right_answer=True)
    assert made == [("4", "5")] and counts["prompts with a right answer"] == 1
    assert pairs(answer("4", 1.0, 1.0), right=right, strategy="none", right_answer=True)[0] == []
    both = pairs(answer("3", 0.5), answer("5", 0.0), right=right, right_answer=True)[0]
    assert both[0] == ("3", "5") and both[1] in (("4", "3"), ("4", "5"))


def test_impossible_settings_are_refused() -> None:
    for given, sentence in ((["strategy=none"], "makes no pairs"), (["sampling.n=1"], "nothing to compare")):
        with pytest.raises(ConfigError, match=sentence):
            read_config(GeneratePreferencesConfig, given)


# ------------------------------------------------------------------------------------------------------ right answers


def test_right_answers_are_demonstrated_or_the_verifiers_own(tmp_path: Path) -> None:
    """A demonstration gives its whole solution; an answer for the verifier itself; one that its verifier does not accept gives nothing."""
    tokenizer = train_tokenizer(["2 and 3 make 5. #### 5"], 260)
    demonstrations, checked = tmp_path / "demonstrations.jsonl", tmp_path / "checked.jsonl"
    demonstrations.write_text(json.dumps({"question": "2 + 3?", "answer": "2 and 3 make 5.\n#### 5"}) + "\n")
    checked.write_text(json.dumps({"prompt": "2 + 2?", "answer": "4"}) + "\n")
    config = PromptsConfig(files=(demonstrations, checked))
    prompts = load_prompts(config, tmp_path / "none", tokenizer).prompts
    found = load_right_answers(config, tmp_path / "none", prompts, tokenizer)
    assert [found[serial].text for serial in (0, 1)] == ["2 and 3 make 5.\n#### 5", "4"]
    for p in prompts:
        whole = encode_conversation(tokenizer, [*p.messages, {"role": "assistant", "content": found[p.serial].text}]).token_ids
        assert [*p.token_ids, *found[p.serial].token_ids] == whole.tolist() and not found[p.serial].truncated


def test_without_any_right_answer_the_job_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "?"}\n')
    tokenizer = train_tokenizer(["?"], 260)
    prompts = load_prompts(PromptsConfig(), tmp_path / "prompts.jsonl", tokenizer).prompts
    with pytest.raises(DataError, match="no prompt carries a right answer"):
        load_right_answers(PromptsConfig(), tmp_path / "prompts.jsonl", prompts, tokenizer)


# -------------------------------------------------------------------------------------------------------------- files


def filled(directory: Path, config: GeneratePreferencesConfig, order: range) -> PairFile:
    file = PairFile(directory, config, "a/model")
    for serial in order:
        asked = prompt(serial, f"{serial % 50} + 1?")  # each question twice
        file.add(asked, *make_pairs(Answers(asked, (answer("a", 1.0), answer("b", 0.0)), None), config, []))
    return file


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_share_no_question_and_do_not_depend_on_who_was_first(tmp_path: Path) -> None:
    config = GeneratePreferencesConfig(held_out_share=0.2)
    for name, order in (("forward", range(100)), ("backward", range(99, -1, -1))):
        filled(tmp_path / name, config, order).write()
    learnt, held_out = (read(tmp_path / "forward" / f"{name}.jsonl") for name in ("preferences", "held_out"))
    asked = [{row["prompt"][0]["content"] for row in rows} for rows in (learnt, held_out)]
    assert len(learnt) + len(held_out) == 100 and not asked[0] & asked[1] and 4 <= len(held_out) <= 40
    for path in (tmp_path / "forward").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "backward" / path.name).read_bytes()
    manifest = json.loads((tmp_path / "forward" / "manifest.json").read_text())
    assert manifest["became_of"]["pairs"] == 100 and manifest["became_of"]["pairs held out"] == len(held_out)
    assert manifest["counts"] == {"preferences": {"sums": len(learnt)}, "held_out": {"sums": len(held_out)}}
    assert not list(tmp_path.glob(".*"))


def test_what_was_made_by_another_configuration_or_model_is_refused(tmp_path: Path) -> None:
    config = GeneratePreferencesConfig()
    file = filled(tmp_path / "pairs", config, range(3))
    assert not file.is_complete
    file.write()
    assert PairFile(tmp_path / "pairs", config.model_copy(update={"run": "other", "prompts_per_batch": 7}), "a/model").is_complete
    with pytest.raises(DataError, match=r"min_margin: 0\.0 then, 0\.5 now.*choose another run="):
        PairFile(tmp_path / "pairs", config.model_copy(update={"min_margin": 0.5}), "a/model")
    with pytest.raises(DataError, match=r"the model sft is not what it was when .* was made from it; choose another run="):
        PairFile(tmp_path / "pairs", config, "another/model")


def test_a_job_that_follows_a_killed_one_takes_over_what_it_had(tmp_path: Path) -> None:
    config, prompts = GeneratePreferencesConfig(held_out_share=0.2), [prompt(serial, f"{serial} + 1?") for serial in range(6)]

    def answered(file: PairFile, some: list[Prompt]) -> PairFile:
        for asked in some:
            file.add(asked, *make_pairs(Answers(asked, (answer("a", float(asked.serial)), answer("b", -1.0)), None), config, []))
        return file

    def begun(name: str, config: GeneratePreferencesConfig = config, model: str = "a/model") -> PairFile:
        return PairFile(tmp_path / name, config, model)

    whole = begun("whole")
    assert answered(whole, whole.take_over(prompts)).counts["prompts"] == 6
    whole.write()

    killed = begun("killed")
    answered(killed, killed.take_over(prompts)[3:])
    kept = tmp_path / ".killed.jsonl"
    kept.write_text(kept.read_text() + '{"serial": 0, "pai')  # torn
    next_one = begun("killed")
    assert [asked.serial for asked in next_one.take_over(prompts)] == [0, 1, 2]
    answered(next_one, prompts[:2])
    last = begun("killed")
    left = last.take_over(prompts)
    assert [asked.serial for asked in left] == [2] and last.counts["prompts"] == 5
    answered(last, left).write()
    for path in (tmp_path / "whole").glob("*.json*"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert not list(tmp_path.glob(".*"))

    file = begun("other")
    answered(file, file.take_over(prompts)[:1])
    more_deaths = config.model_copy(update={"restart_limit": 9, "generator": GeneratorConfig(restart_limit=9, fatal_prompt_limit=9)})
    assert len(begun("other", more_deaths).take_over(prompts)) == 5
    for another in (begun("other", config.model_copy(update={"min_margin": 0.5})), begun("other", model="another/model")):
        with pytest.raises(DataError, match=r"\.other\.jsonl has the pairs of 1 prompts that were made by another configuration, other models or of other"):
            another.take_over(prompts)
    with pytest.raises(DataError, match="give the command that began them, or remove the file"):
        begun("other").take_over(prompts[:5])
    assert len(begun("other").take_over(prompts)) == 5  # nothing is lost


def test_a_model_that_was_trained_again_is_another(tmp_path: Path) -> None:
    """Its directory has the same name and other weights."""
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    config = GeneratePreferencesConfig()
    file = PairFile(tmp_path / "pairs", config, str(weights.parent))
    file.add(prompt(), *make_pairs(Answers(prompt(), (answer("a", 1.0), answer("b", 0.0)), None), config, []))
    file.write()
    assert PairFile(tmp_path / "pairs", config, str(weights.parent)).is_complete
    weights.write_bytes(b"again")
    with pytest.raises(DataError, match="the model sft is not what it was"):
        PairFile(tmp_path / "pairs", config, str(weights.parent))


def test_no_pair_at_all_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    file = PairFile(tmp_path / "pairs", GeneratePreferencesConfig(), "a/model")
    file.add(prompt(), *make_pairs(Answers(prompt(), (answer("a", 1.0), answer("b", 1.0)), None), file.config, []))
    with pytest.raises(DataError, match="no two of 2 answers to 1 prompts make a pair"):
        file.write()
    assert not (tmp_path / "pairs").exists()


def test_the_share_that_is_held_out_is_about_what_was_asked() -> None:
    held = [is_held_out(prompt(text=str(i)), 0.1, seed=0) for i in range(2000)]
    assert 150 < sum(held) < 250 and not any(is_held_out(prompt(text=str(i)), 0.0, seed=0) for i in range(50))
    assert held != [is_held_out(prompt(text=str(i)), 0.1, seed=1) for i in range(2000)]
