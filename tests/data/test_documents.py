"""Every document is read in exactly one stretch, wherever files are cut, and a bad line is named."""

import json
from pathlib import Path

import pytest

from minigpt_ray.data.documents import Document, Stretch, cut, read
from minigpt_ray.data.rows import DataError


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "source": f"s{i % 2}"}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


@pytest.mark.parametrize("length", [1, 7, 40, 41, 1000])
def test_every_line_is_read_once_and_in_order_however_a_file_is_cut(tmp_path: Path, length: int) -> None:
    texts = [f"déjà {'vu ' * (i % 5)}{i}" for i in range(20)]
    path = write(tmp_path / "a.jsonl", texts)
    size = path.stat().st_size
    stretches = [Stretch(path, start, min(start + length, size)) for start in range(0, size, length)]
    assert [document.text for stretch in stretches for document in read(stretch)] == texts


def test_stretches_cover_the_files_and_are_enough_for_a_validation_share(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", ["text " * 200] * 100) for name in "ab"]
    stretches = cut(paths)
    assert len(stretches) > 20
    for path in paths:
        own = [stretch for stretch in stretches if stretch.path == path]
        assert [s.start for s in own] == [0, *(s.end for s in own[:-1])] and own[-1].end == path.stat().st_size


def test_one_source_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b", "c"])
    assert list(read(cut([path], only="s0")[0])) == [Document("a", "s0"), Document("c", "s0")]


def test_plain_text_is_cut_at_line_ends_and_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\ntwo\nthree")
    path = tmp_path / "book.txt"
    assert [document for stretch in (Stretch(path, 0, 5), Stretch(path, 5, 13)) for document in read(stretch)] == [
        Document("one\ntwo\n", "book"),
        Document("three", "book"),
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": ', r"a\.jsonl:3: not JSON"),
        ("[1]", r"a\.jsonl:3: the line is a list \(\[1\]\); expected a JSON object"),
        ('{"txt": "a"}', r"a\.jsonl:3: field 'text' is missing, found 'txt'"),
        ('{"text": " "}', r"a\.jsonl:3: field 'text' is empty"),
        ('{"text": "a", "source": 3}', r"a\.jsonl:3: field 'source' is a number"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = write(tmp_path / "a.jsonl", ["first", "second"])
    size = path.stat().st_size
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=sentence):
        list(read(Stretch(path, size, size + 100)))


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8 \(byte 0xff\)"):
        list(read(cut([tmp_path / "a.txt"])[0]))
