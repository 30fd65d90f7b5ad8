"""Rewards over HTTP: the example server as a process, and servers that are slow, broken or talk nonsense."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from actors.attempts import Fault
from actors.model_scorer import ModelScorer
from actors.rank_host import Rank
from actors.reward_functions import RewardFunctions
from actors.reward_http import RewardServer
from actors.reward_server import bind
from actors.reward_sources import check_sources
from minigpt_ray.config import HttpReward, VerifierReward
from minigpt_ray.models import export, load_scalar
from minigpt_ray.reward_protocol import Sample
from minigpt_ray.tokenizer import encode_conversation, load_tokenizer
from tests.actors.test_attempts import rollouts
from tests.actors.test_rewards import ROLLOUTS

CHECKOUT = Path(__file__).parents[2]
RANK = Rank(0, 1, "cpu")

# ------------------------------------------------------------------------------------------- servers with a fault


@dataclass
class Fake:
    """A server that answers as it is told: status and body, one piece after the other."""

    status: int = 200
    body: Callable[[list[dict]], bytes] = lambda samples: json.dumps({"scores": [float(len(s["response"])) for s in samples]}).encode()
    wait_s: float = 0
    """Before each piece of the answer."""
    piece: int = 1 << 20
    headers: dict[str, str] = field(default_factory=dict)
    failures: int | None = None
    """As many requests are answered with `status`, the rest with 200; None: all."""
    seen: list[dict] = field(default_factory=list)
    """Headers and body of each request."""
    busy: int = 0
    most_busy: int = 0
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def do_POST(self) -> None:
        fake = self.fake
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.seen.append({"authorization": self.headers["Authorization"], **request})
        fake.busy += 1
        fake.most_busy = max(fake.most_busy, fake.busy)
        failing = fake.failures is None or len(fake.seen) <= fake.failures
        body = fake.body(request["samples"])
        try:
            self.send_response(fake.status if failing else 200)
            for name, value in fake.headers.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(body), fake.piece):
                time.sleep(fake.wait_s)
                self.wfile.write(body[start : start + fake.piece])
        except OSError:
            pass  # the client has gone, as it should
        finally:
            fake.busy -= 1

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Fake]:
    told = Fake()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Told", (Handler,), {"fake": told}))
    server.daemon_threads = True
    told.url = f"http://127.0.0.1:{server.server_port}/score"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield told
    server.shutdown()
    server.server_close()


def config(url: str, **fields: object) -> HttpReward:
    return HttpReward.model_validate({"url": url, "backoff_s": 0.01, **fields})


def fault(url: str, **fields: object) -> Fault:
    with pytest.raises(Fault) as caught:
        RewardServer(config(url, **fields), None)(rollouts("a", "bb"))
    return caught.value


def answer(text: str) -> Callable[[list[dict]], bytes]:
    return lambda samples: text.encode()


def test_a_server_gets_what_a_verifier_needs_and_gives_a_score_for_each(fake: Fake) -> None:
    assert RewardServer(config(fake.url), "secret")(ROLLOUTS[:1]) == [3.0]
    ((sample,),) = [request["samples"] for request in fake.seen]
    assert sample == {"prompt": [{"role": "user", "content": "?"}], "response": "tac", "answer": ROLLOUTS[0].prompt.answer, "source": "source"}
    assert fake.seen[0]["authorization"] == "Bearer secret"


def test_null_is_no_score_and_other_fields_are_ignored(fake: Fake) -> None:
    fake.body = answer('{"scores": [null, 2], "model": "x"}')
    np.testing.assert_equal(RewardServer(config(fake.url), None)(rollouts("a", "b")), [math.nan, 2.0])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>", "the answer: Invalid JSON"),
        ("", "the answer: Invalid JSON"),
        ("[1, 2]", "the answer: Input should be an object"),
        ('{"score": [1, 2]}', "scores: Field required"),
        ('{"scores": [1, "2"]}', "scores.1: Input should be a valid number"),
        ('{"scores": [true, 2]}', "scores.0: Input should be a valid number"),
        ('{"scores": [1, NaN]}', "scores.1: Input should be a finite number"),
        ('{"scores": [1, 1e999]}', "scores.1: Input should be a finite number"),
    ],
)
def test_an_answer_that_is_no_list_of_numbers_is_an_error(fake: Fake, body: str, reason: str) -> None:
    fake.body = answer(body)
    found = fault(fake.url)
    assert found.kind == "errors" and f'{fake.url} answered with something else than {{"scores": [number or null, ...]}}: {reason}' in found.reason


@pytest.mark.parametrize(("status", "kind"), [(400, "errors"), (401, "errors"), (422, "errors"), (302, "errors"), (429, "lost"), (500, "lost"), (503, "lost")])
def test_a_status_says_whether_the_samples_or_the_server_are_to_blame(fake: Fake, status: int, kind: str) -> None:
    """Redirects are not followed: this one leads to a place that would answer."""
    fake.status, fake.body, fake.headers = status, answer("the reason\n"), {"Location": fake.url}
    found = fault(fake.url)
    assert (found.kind, found.reason) == (kind, f"{fake.url} answered with status {status}: 'the reason'")
    assert len(fake.seen) == 1


def test_an_answer_that_is_too_large_is_not_read_to_its_end(fake: Fake) -> None:
    fake.body, fake.piece, fake.wait_s = answer("x" * 100_000), 1000, 0.02
    begin = time.monotonic()
    found = fault(fake.url, max_response_bytes=2000)
    assert (found.kind, found.reason) == ("errors", f"{fake.url} answered with more than max_response_bytes=2000")
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("piece", [1 << 20, 1])
def test_a_slow_answer_and_one_that_drips_end_at_the_deadline(fake: Fake, piece: int) -> None:
    fake.wait_s, fake.piece = (30, piece) if piece > 1 else (0.1, piece)
    fake.body = answer(" " * 100)
    begin = time.monotonic()
    found = fault(fake.url, timeout_s=0.5)
    assert (found.kind, found.reason) == ("timeouts", f"{fake.url} gave no answer within timeout_s=0.5")
    assert time.monotonic() - begin < 2


def test_a_server_that_is_not_there_is_lost() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        found = fault(url)
    assert found.kind == "lost" and f"{url} could not be reached (ConnectError: " in found.reason


def test_batches_are_posted_side_by_side_but_no_more_than_allowed(fake: Fake) -> None:
    fake.wait_s = 0.2
    source = RewardFunctions(RANK, {"judge": config(fake.url, batch_size=2, concurrency=3)}, {"judge": None}).sources["judge"]
    found = source.score(rollouts(*("x" * n for n in range(20))))
    assert found.scores == list(range(20)) and not any(found.calls.values())
    assert len(fake.seen) == 10 and 2 <= fake.most_busy <= 3


def test_a_server_in_trouble_is_asked_again_and_that_is_counted(fake: Fake) -> None:
    fake.status, fake.failures = 503, 2
    source = RewardFunctions(RANK, {"judge": config(fake.url)}, {"judge": None}).sources["judge"]
    found = source.score(rollouts("a", "bb"))
    assert found.scores == [1, 2] and found.calls == {"errors": 0, "timeouts": 0, "lost": 2, "retries": 2}


def test_a_server_that_scores_too_few_is_told_of_by_name_with_a_remedy(fake: Fake) -> None:
    fake.body = answer('{"scores": []}')
    found = RewardFunctions(RANK, {"judge": config(fake.url, retries=0, max_errors=0)}, {"judge": None}).sources["judge"].score(rollouts("a", "b"))
    assert found.too_many == (
        "rewards.judge: 1 of the newest 1 rollouts stay without a score, where max_errors=0 of 100 may; the last failure: it gave 0 scores for 1 rollouts; "
        "it must give one for each, in order; mend the server, or raise rewards.judge.max_errors"
    )


# -------------------------------------------------------------------------------------------- before the job starts


def test_a_server_is_asked_before_the_job_starts(fake: Fake, tmp_path: Path) -> None:
    check_sources({"judge": config(fake.url)}, tmp_path)
    assert fake.seen[0]["samples"] == []
    fake.status, fake.body = 404, answer("not here")
    with pytest.raises(ValueError, match=r"rewards\.judge: http.* answered with status 404: 'not here'; start the server, or correct rewards\.judge\.url"):
        check_sources({"judge": config(fake.url)}, tmp_path)


def test_a_token_comes_from_the_environment_and_its_absence_is_told(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = config(fake.url, token_env="JUDGE_TOKEN")
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    check_sources({"judge": judge}, tmp_path)
    assert fake.seen[0]["authorization"] == "Bearer secret"
    monkeypatch.setenv("JUDGE_TOKEN", "secret\n")
    with pytest.raises(ValueError, match=r"token_env=JUDGE_TOKEN: the token has blanks, line ends"):
        check_sources({"judge": judge}, tmp_path)
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(ValueError, match=r"rewards\.judge\.token_env=JUDGE_TOKEN: there is no such environment variable, or it is empty; export it"):
        check_sources({"judge": judge}, tmp_path)


@pytest.mark.parametrize("url", ["ftp://host/", "host:8000", "http://user:password@host/", "http://", "http://host/a b"])
def test_what_is_no_url_or_carries_credentials_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        config(url)


# ---------------------------------------------------------------------------------------------- the example server

FUNCTIONS = """
import time
def short_text(samples):
    return [max(0.0, 1 - len(sample.response) / 64) for sample in samples]
def faulty(samples):
    for sample in samples:
        if sample.response == "slow": time.sleep(2)
        if sample.response == "raise": raise KeyError("no such thing")
    if any(sample.response == "few" for sample in samples): return []
    return [None if sample.response == "none" else "x" if sample.response == "text" else 1.0 for sample in samples]
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts `python -m jobs.serve_reward` with some overrides; gives the URL that it prints."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "a_users_server.py").write_text(FUNCTIONS)
    running: list[subprocess.Popen] = []

    def start(*overrides: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(directory), "SERVER_TOKEN": "secret"}
        command = [sys.executable, "-m", "jobs.serve_reward", "port=0", f"output_dir={directory}", *overrides]
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("rewards at http://127.0.0.1:"), line
        return line.split()[-1]

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def faulty(started: Callable[..., str]) -> str:
    return started("function=a_users_server:faulty", "token_env=SERVER_TOKEN", "max_request_bytes=5000")


@pytest.mark.slow
def test_the_debug_server_scores_as_the_verifier_does(started: Callable[..., str], tmp_path: Path) -> None:
    url = started(str(CHECKOUT / "configs/debug/serve_reward.yaml"))
    sources = {"judge": config(url, batch_size=2), "verifier": VerifierReward()}
    check_sources(sources, tmp_path)
    found = RewardFunctions(RANK, sources, {"judge": None}).score(ROLLOUTS)
    np.testing.assert_equal(found["judge"].scores, found["verifier"].scores)


@pytest.mark.slow
def test_a_function_of_samples_is_served(started: Callable[..., str]) -> None:
    url = started("function=a_users_server:short_text")
    assert RewardServer(config(url), None)(rollouts("", "x" * 32, "x" * 64)) == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_only_the_samples_that_a_served_function_fails_on_stay_without_a_score(faulty: str) -> None:
    judge = config(faulty, timeout_s=1, retries=1, batch_size=8, concurrency=1)
    found = RewardFunctions(RANK, {"judge": judge}, {"judge": "secret"}).sources["judge"].score(rollouts("a", "none", "few", "raise", "text", "b"))
    np.testing.assert_equal(found.scores, [1, math.nan, math.nan, math.nan, math.nan, 1])
    assert found.calls == {"errors": 2 + 3, "timeouts": 0, "lost": 0, "retries": 1 + 6} and found.too_many == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("raise", "errors", "status 422: '{\"detail\":\"KeyError: 'no such thing'\"}'"),
        ("few", "errors", "0 scores for 1 samples"),
        ("text", "errors", "scores.0: Input should be a valid number"),
        ("slow", "timeouts", "gave no answer within timeout_s=0.7"),
        ("x" * 6000, "errors", "status 413"),
    ],
)
def test_the_faults_of_a_served_function(faulty: str, text: str, kind: str, reason: str) -> None:
    with pytest.raises(Fault) as caught:
        RewardServer(config(faulty, timeout_s=0.7 if text == "slow" else 60), "secret")(rollouts(text))
    assert caught.value.kind == kind and reason.replace("'", "") in caught.value.reason.replace("'", "").replace("\\", "")


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_request_without_the_token_gets_nothing(faulty: str, token: str | None) -> None:
    with pytest.raises(Fault, match="answered with status 401"):
        RewardServer(config(faulty), token)(rollouts("a"))


@pytest.mark.slow
def test_what_is_no_request_is_refused_and_nothing_else_is_served(faulty: str) -> None:
    headers = {"Authorization": "Bearer secret"}
    assert httpx.post(faulty, content=b"{", headers=headers).status_code == 422
    assert httpx.post(faulty, json={"samples": [{"response": "a"}]}, headers=headers).json()["detail"].startswith("samples.0.prompt: Field required")
    assert httpx.post(faulty, content=b"{}", headers=[(b"Authorization", "Bearer sécret".encode())]).status_code == 401
    assert httpx.get(faulty, headers=headers).status_code == 405
    assert httpx.get(faulty.replace("/score", "/docs")).status_code == 404


@pytest.mark.parametrize("budget", [1, 16384])
def test_a_served_model_scores_the_end_of_each_conversation(nano: Path, tmp_path: Path, budget: int) -> None:
    tokenizer = load_tokenizer(nano)
    export(load_scalar(str(nano), "float32", seed=5), tokenizer, tmp_path)
    samples = [Sample(prompt=[{"role": "user", "content": "?"}], response=text, answer=None, source="") for text in ("a", "much longer", "")]
    found = ModelScorer(str(tmp_path), "float32", budget)(samples)
    model = load_scalar(str(tmp_path), "float32", seed=0).eval()
    for sample, score in zip(samples, found, strict=True):
        ids = encode_conversation(tokenizer, [*sample.prompt, {"role": "assistant", "content": sample.response}]).token_ids
        with torch.no_grad():
            assert score == pytest.approx(model(torch.from_numpy(ids)[None]).logits.item(), abs=1e-5)
    assert ModelScorer(str(tmp_path), "float32", budget)([]) == [] and len(set(found)) == 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("function=a_users_server:missing", "function=a_users_server:missing: No module named 'a_users_server'; name it as module:function"),
        ("model=nowhere", "init_from='nowhere' is neither a finished stage"),
        ("token_env=NO_SUCH_TOKEN", "token_env=NO_SUCH_TOKEN: there is no such environment variable"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.serve_reward", override, f"output_dir={tmp_path}"], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(sentence) and len(done.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_told() -> None:
    with bind("127.0.0.1", 0) as taken:
        with pytest.raises(ValueError, match=rf"host=127\.0\.0\.1 port={taken.getsockname()[1]} cannot be bound \(Address already in use\)"):
            bind("127.0.0.1", taken.getsockname()[1])
