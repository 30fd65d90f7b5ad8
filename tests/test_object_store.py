"""A finished model goes to an object store too: a small server that speaks S3's language, and what cannot be written to."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import IO
from urllib.parse import parse_qs, urlsplit

import pytest

from minigpt_ray.model_directory import ExportError
from minigpt_ray.object_store import check_store, deliver


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as a client needs that writes objects: https://docs.aws.amazon.com/AmazonS3/latest/API/"""

    objects: dict[str, bytes]
    parts: dict[str, dict[int, bytes]]
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = _join(self.rfile) if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return _join(BytesIO(body)) if "aws-chunked" in self.headers.get("Content-Encoding", "") else body

    @property
    def _key(self) -> str:
        return urlsplit(self.path).path.strip("/")

    def do_HEAD(self) -> None:
        known = self._key in self.objects or self._key == "models"
        self._answer(200 if known else 404)

    def do_GET(self) -> None:
        self._answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")

    def do_PUT(self) -> None:
        query, body = parse_qs(urlsplit(self.path).query), self._body()
        if "partNumber" in query:
            self.parts[self._key][int(query["partNumber"][0])] = body
        else:
            self.objects[self._key] = body
        self._answer(200, ETag='"tag"')

    def do_POST(self) -> None:
        self._body()
        if "uploads" in urlsplit(self.path).query:
            self.parts[self._key] = {}
            self._answer(200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        else:
            parts = self.parts.pop(self._key)
            self.objects[self._key] = b"".join(parts[number] for number in sorted(parts))
            self._answer(200, b"<CompleteMultipartUploadResult><ETag>tag</ETag></CompleteMultipartUploadResult>")

    def do_DELETE(self) -> None:
        self.objects.pop(self._key, None)
        self._answer(204)

    def log_message(self, *_: object) -> None:
        pass


def _join(stream: IO[bytes]) -> bytes:
    """Chunks, each after a line with its size; what follows the last one up to an empty line is of no interest."""
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass
    return body


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Port and objects."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    handler = type("Handler", (Bucket,), {"objects": {}, "parts": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], handler.objects
    server.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 50_000)  # more than one part
    return directory


def test_a_model_is_copied_to_a_bucket(bucket: tuple[int, dict[str, bytes]], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, objects = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    said: list[str] = []
    check_store("s3://models/ours")
    deliver(model, "s3://models/ours", "gsm", "ppo", said.append)
    assert said == [f"the model is in {model}", "and in s3://models/ours/gsm/ppo"]
    stored = {key: value for key, value in objects.items() if value}
    assert stored == {f"models/ours/gsm/ppo/{path.name}": path.read_bytes() for path in model.iterdir()}


def test_a_model_is_copied_to_a_directory_by_url(model: Path, tmp_path: Path) -> None:
    check_store(f"file://{tmp_path}/store")
    assert list((tmp_path / "store").iterdir()) == []
    deliver(model, f"file://{tmp_path}/store", "gsm", "sft", lambda line: None)
    assert sorted(path.name for path in (tmp_path / "store" / "gsm" / "sft").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("url", ["nowhere://bucket/models", "file:///proc/models"])
def test_what_cannot_be_written_to_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"export_to={url}: nothing can be written there (")):
        check_store(url)


def test_a_store_that_takes_nothing_any_more_is_said_with_the_remedy(model: Path, tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    sentence = f"file://{tmp_path}/store/gsm/sft: the model could not be copied there ("
    with pytest.raises(ExportError, match=re.escape(sentence) + r".*\); mend the store, and checkpoint\.resume=auto copies it again"):
        deliver(model, f"file://{tmp_path}/store", "gsm", "sft", lambda line: None)


def test_without_a_url_nothing_is_tried(model: Path) -> None:
    said: list[str] = []
    check_store(None)
    deliver(model, None, "gsm", "sft", said.append)
    assert said == [f"the model is in {model}"]
