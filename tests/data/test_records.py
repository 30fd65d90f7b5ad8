"""Files of every kind become records with their places; what is damaged is named."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from minigpt_ray.data import records
from minigpt_ray.data.records import DataError, read_records

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def found(path: Path, **options: object) -> list[tuple[str, str]]:
    """Text and line, or row, of each record."""
    return [(record.value["text"], record.place.removeprefix(f"{path}:")) for record in read_records(path, **options)]  # type: ignore[arg-type]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES)), ("a.jsonl.zst", zst(LINES))], ids=["plain", "gz", "zst"]
)
def test_compressed_lines_are_those_of_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert found(tmp_path / name) == [("a", "1"), ("b", "2")]


def test_compressed_arrays_and_texts_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[\n{"text": "a"},\n{"text": "b"}]'))
    (tmp_path / "a.txt.zst").write_bytes(zst("é\n".encode()))
    assert found(tmp_path / "a.json.gz") == [("a", "2"), ("b", "3")]
    assert found(tmp_path / "a.txt.zst") == [("é", "1")]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl.gz", gzip.compress(LINES * 100)), ("a.jsonl.zst", zst(LINES * 100))], ids=["gz", "zst"])
def test_a_file_that_was_cut_off_or_never_compressed_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    for damaged in (content[: len(content) // 2], LINES):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read to its end .*; expected a whole \.(gz|zst) file; fetch it again"):
            found(tmp_path / name)


def test_parquet_rows_have_the_fields_that_are_not_null(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"], "source": ["x", None]}), path)
    assert [(record.value, record.place) for record in read_records(path)] == [
        ({"text": "a", "source": "x"}, f"{path}:row 1"),
        ({"text": "b"}, f"{path}:row 2"),
    ]
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=r"a\.parquet: not Parquet"):
        found(path)


def test_plain_text_is_a_document_or_is_cut_and_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n\n\n\nfour")
    assert found(path) == [("one\ntwo\n\nthree\n\n\n\nfour", "1")]
    assert found(path, cut_at="\n\n") == [("one\ntwo", "1"), ("three", "4"), ("four", "8")]
    assert found(path, cut_at="\n\n", at_least=10) == [("one\ntwo\n\nthree", "1"), ("four", "8")]
    assert found(path, cut_at="\n\n", at_least=1000) == found(path)


def test_a_text_without_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"a\.txt: the file is empty; expected text"):
        found(tmp_path / "a.txt")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a.txt: not UTF-8 \(byte 0xe9 at position 3\)"):
        found(tmp_path / "a.txt")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_blocks_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    rows = [{"text": "é,]\n" * n, "more": {"x": [1, 2.5, None]}} for n in range(1, 6)]
    array, text = tmp_path / "a.json", tmp_path / "a.txt"
    array.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    text.write_text("é\n\nb\n\n\nc")
    expected = ([(record.value, record.place) for record in read_records(array)], found(text, cut_at="\n\n"))
    monkeypatch.setattr(records, "BLOCK", block)
    assert ([(record.value, record.place) for record in read_records(array)], found(text, cut_at="\n\n")) == expected
    assert [value for value, _ in expected[0]] == rows


def test_the_position_in_the_file_is_told(tmp_path: Path) -> None:
    path, told = tmp_path / "a.jsonl.gz", []
    path.write_bytes(gzip.compress(LINES))
    list(read_records(path, watch=told.append))
    assert told[-1] == path.stat().st_size
