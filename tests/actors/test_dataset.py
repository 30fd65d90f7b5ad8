"""Windows are made once, by Ray Data, and say what is in them."""

import json
import os
import re
import signal
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest

from actors.dataset import Sources, StoredWindows, choose_validation, describe, left_out, prepare_windows
from actors.stage_inputs import Files, StageError
from minigpt_ray.config import PretrainConfig, RewardModelConfig, SFTConfig
from minigpt_ray.data.packing import pack
from minigpt_ray.data.rows import DataError
from minigpt_ray.stages import STAGES
from minigpt_ray.tokenizer import END, encode_document, train_tokenizer


def prepare_sft(path, tokenizer, directory, **fields):
    config = SFTConfig.model_validate({"window": 128, "validation_share": 0.0} | fields)
    return prepare_windows(STAGES["sft"], config, Files((path,)), tokenizer, directory)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], 260)


def demonstrations(path, answers):
    rows = [{"messages": [{"role": "user", "content": f"say {answer}"}, {"role": "assistant", "content": answer}]} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnt(windows, tokenizer):
    """What is learnt in all windows, as text, sorted."""
    text = "".join(tokenizer.decode(ids[mask]) for ids, mask in zip(windows.token_ids, windows.loss_mask, strict=True))
    return sorted(text.split(END)[:-1])


def test_counts_by_hand():
    examples = [(np.array([5, 6, 7], np.int32), np.array([False, True, True])), (np.array([8, 9], np.int32), np.array([False, True]))]
    counts = describe(pack(examples, 8))
    assert [getattr(counts, name).tolist() for name in ("num_tokens", "num_loss_tokens", "num_pairs", "num_examples")] == [[5], [3], [1 + 2 + 3 + 1 + 2], [2]]
    assert len(describe(pack([], 8))) == 0


def test_validation_rows_are_a_share_at_least_one_and_never_all():
    assert len(choose_validation(100, 0.05, seed=0)) == 5
    assert len(choose_validation(10, 0.01, seed=0)) == 1
    assert choose_validation(10, 0.0, seed=0) == choose_validation(1, 0.5, seed=0) == set()
    assert choose_validation(100, 0.05, seed=0) == choose_validation(100, 0.05, seed=0) != choose_validation(100, 0.05, seed=1)


@pytest.mark.ray
def test_every_row_is_in_one_window_of_one_part(ray_cluster, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "sft", replace(STAGES["sft"], block_items=7))
    answers = [f"answer {i}" for i in range(30)]
    directory = prepare_sft(demonstrations(tmp_path / "a.jsonl", answers), tokenizer, tmp_path / "windows", validation_share=0.1)
    train, validation = (StoredWindows.load(directory / part) for part in ("train", "validation"))
    assert len(learnt(validation, tokenizer)) == 3
    assert sorted(learnt(train, tokenizer) + learnt(validation, tokenizer)) == sorted(answers)
    assert train.num_examples.sum() == 27 and train.token_ids.shape[1] == 128


@pytest.mark.ray
def test_a_data_worker_that_is_killed_is_replaced_and_the_windows_are_the_same(ray_cluster, tokenizer, tmp_path, monkeypatch):
    path = demonstrations(tmp_path / "a.jsonl", [f"answer {i}" for i in range(30)])
    stage, died = replace(STAGES["sft"], block_items=7), tmp_path / "died"

    def dies_once(tokenizer, item, config):
        if str(item.place).endswith(":16") and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return stage.encode(tokenizer, item, config)

    monkeypatch.setitem(STAGES, "sft", stage)
    undisturbed = prepare_sft(path, tokenizer, tmp_path / "undisturbed") / "train"
    monkeypatch.setitem(STAGES, "sft", replace(stage, encode=dies_once))
    disturbed = prepare_sft(path, tokenizer, tmp_path / "disturbed") / "train"
    assert died.exists()
    assert {file.name: file.read_bytes() for file in disturbed.iterdir()} == {file.name: file.read_bytes() for file in undisturbed.iterdir()}


@pytest.mark.ray
def test_a_data_worker_that_stands_still_ends_the_job_with_a_sentence(ray_cluster, tokenizer, tmp_path, monkeypatch):
    path = demonstrations(tmp_path / "a.jsonl", [f"answer {i}" for i in range(30)])
    stage, stopped = replace(STAGES["sft"], block_items=7), tmp_path / "stopped"

    def stops(tokenizer, item, config):
        if str(item.place).endswith(":16") and not stopped.exists():
            stopped.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return stage.encode(tokenizer, item, config)

    monkeypatch.setitem(STAGES, "sft", replace(stage, encode=stops))
    try:
        with pytest.raises(StageError, match=r"no block of 7 rows was tokenised for 8 s: a data worker stands still, .* raise hang_after_s"):
            prepare_sft(path, tokenizer, tmp_path / "windows", hang_after_s=8)
    finally:
        os.kill(int(stopped.read_text()), signal.SIGKILL)
    assert not list((tmp_path / "windows").glob("[!.]*"))


def test_windows_are_made_again_only_when_what_they_are_made_from_changes(tokenizer, tmp_path):
    path = demonstrations(tmp_path / "a.jsonl", ["one", "two", "three"])

    def prepare(window=128):
        return prepare_sft(path, tokenizer, tmp_path / "windows", window=window)

    first = prepare()
    made = (first / "train" / "token_ids.npy").stat().st_mtime_ns
    assert prepare() == first and (first / "train" / "token_ids.npy").stat().st_mtime_ns == made
    assert prepare(window=192) != first
    demonstrations(path, ["one", "two", "four"])
    again = prepare()
    assert again != first
    assert learnt(StoredWindows.load(again / "train"), tokenizer) == ["four", "one", "two"]
    assert not [p for p in (tmp_path / "windows").iterdir() if p.name.startswith(".")]


def test_a_row_longer_than_the_window_is_refused_with_its_place(tokenizer, tmp_path):
    path = demonstrations(tmp_path / "a.jsonl", ["short", "long " * 40])
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens .* window=96; raise window"):
        prepare_sft(path, tokenizer, tmp_path / "windows", window=96)


def test_a_row_longer_than_the_window_is_left_out_and_counted_when_that_is_asked_for(tokenizer, tmp_path):
    path = demonstrations(tmp_path / "a.jsonl", ["short", "long " * 40, "brief"])
    directory = prepare_sft(path, tokenizer, tmp_path / "windows", window=96, too_long="drop")
    train, validation = (Sources.load({"": directory}, part) for part in ("train", "validation"))
    assert learnt(StoredWindows.load(directory / "train"), tokenizer) == ["brief", "short"]
    assert left_out({"": directory}, train, validation) == 1


def test_a_separator_cuts_text_into_prompt_and_answer_and_is_part_of_what_windows_are_made_from(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"say {word} => {word}", "source": "words"}) + "\n" for word in ("one", "two")))

    def prepare(separator):
        return prepare_sft(path, tokenizer, tmp_path / "windows", separator=separator)

    first = prepare(" => ")
    assert learnt(StoredWindows.load(first / "train"), tokenizer) == ["one", "two"]
    assert prepare(" => ") == first
    assert learnt(StoredWindows.load(prepare("> ") / "train"), tokenizer) == ["one", "two"] and prepare("> ") != first
    remedy = r'a\.jsonl:{}: the row ends with the user, so there is no answer to learn; add one, or for \{{"text"\}} rows set separator'
    with pytest.raises(DataError, match=remedy.format(1)):
        prepare(None)
    path.write_text(path.read_text() + json.dumps({"text": "say three", "source": "words"}) + "\n")
    with pytest.raises(DataError, match=remedy.format(3)):
        prepare(" => ")


# ------------------------------------------------------------------------------------------------------ documents


def documents_file(path, count):
    rows = [{"text": f"document {i} " + "x" * (i * 7 % 500), "source": "even" if i % 2 == 0 else "odd"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["text"] for row in rows]


def prepare_documents(path, tokenizer, directory, only=None, **fields):
    config = PretrainConfig.model_validate({"window": 64, "validation_share": 0.05} | fields)
    return prepare_windows(STAGES["pretrain"], config, Files((path,), only), tokenizer, directory)


@pytest.mark.ray
def test_every_token_of_every_document_is_learnt_once(ray_cluster, tokenizer, tmp_path):
    texts = documents_file(tmp_path / "d.jsonl", 300)
    directory = prepare_documents(tmp_path / "d.jsonl", tokenizer, tmp_path / "windows")
    train, validation = (StoredWindows.load(directory / part) for part in ("train", "validation"))
    found = Counter()
    for windows in (train, validation):
        assert len(windows) > 0 and (windows.num_tokens <= 64).all()
        found.update(windows.token_ids[windows.loss_mask].tolist())
    expected = Counter(token for text in texts for token in encode_document(tokenizer, text).token_ids[1:].tolist())
    assert found == expected
    assert len(validation) < 0.2 * len(train)
    held_out = Sources({"": validation}).by_source()
    assert held_out.keys() == {"even", "odd"} and sorted(np.concatenate(list(held_out.values()))) == list(range(len(validation)))
    for source, rows in held_out.items():
        text = tokenizer.decode(validation.token_ids[rows].ravel())
        assert {int(number) % 2 == 0 for number in re.findall(r"document (\d+) ", text)} == {source == "even"}
    assert set(Sources({"": train}).by_source()) == {""} and set(Sources({"a": train, "b": validation}).by_source()) == {"a", "b"}


class PeakMemory:
    """The most memory that this process alone has held, in bytes, above what it held before."""

    def __enter__(self):
        self.before = self.most = psutil.Process().memory_full_info().uss
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.ended.wait(0.02):
            self.most = max(self.most, psutil.Process().memory_full_info().uss)

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()

    @property
    def growth(self):
        return self.most - self.before


@pytest.mark.ray
@pytest.mark.slow
def test_the_driver_holds_some_blocks_of_documents_and_never_all(ray_cluster, tokenizer, tmp_path):
    documents_file(tmp_path / "small.jsonl", 100)
    prepare_documents(tmp_path / "small.jsonl", tokenizer, tmp_path / "windows")  # what libraries take once
    row = json.dumps({"text": "one of many words " * 50}) + "\n"
    (tmp_path / "large.jsonl").write_text(row * 12_000)
    with PeakMemory() as memory:
        directory = prepare_documents(tmp_path / "large.jsonl", tokenizer, tmp_path / "windows", window=512)
    stored = sum(path.stat().st_size for path in directory.rglob("*.npy"))
    assert stored > 90e6 and memory.growth < stored / 3


@pytest.mark.ray
def test_one_source_of_a_file_has_windows_of_its_own(ray_cluster, tokenizer, tmp_path):
    documents_file(tmp_path / "d.jsonl", 40)
    directories = [prepare_documents(tmp_path / "d.jsonl", tokenizer, tmp_path / "windows", only=only, validation_share=0) for only in (None, "even", "odd")]
    whole, even, odd = (StoredWindows.load(directory / "train").num_loss_tokens.sum() for directory in directories)
    assert len(set(directories)) == 3 and even + odd == whole and min(even, odd) > 0


@pytest.mark.ray
def test_a_bad_line_far_into_a_file_is_named(ray_cluster, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "pretrain", replace(STAGES["pretrain"], block_items=4))
    documents_file(tmp_path / "d.jsonl", 300)
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write('{"txt": "?"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:301: field 'text' is missing, found 'txt'"):
        prepare_documents(tmp_path / "d.jsonl", tokenizer, tmp_path / "windows")


# ----------------------------------------------------------------------------------------------------- preferences


def test_pairs_are_stored_whole_with_their_margins_and_a_prompt_is_on_one_side(tokenizer, tmp_path):
    rows = [{"prompt": f"say {i % 10}", "chosen": f"well {i}", "rejected": f"no {i}", "margin": i} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, stage = RewardModelConfig(validation_share=0.1), STAGES["reward_model"]
    directory = prepare_windows(stage, config, Files((tmp_path / "p.jsonl",)), tokenizer, tmp_path / "windows")
    train, validation = (StoredWindows.load(directory / part) for part in ("train", "validation"))
    assert (train.num_examples.sum(), validation.num_examples.sum()) == (36, 4)  # one prompt of ten, with its four pairs
    margins = [sorted(part.numbers["margin"][part.numbers["margin"] > 0].tolist()) for part in (train, validation)]
    assert len({margin % 10 for margin in margins[1]} - {0}) <= 1 and sum(map(sum, margins)) == sum(range(40))
    assert train.num_loss_tokens.sum() == 2 * 36
