"""A reward server: the protocol of minigpt_ray/reward_protocol.py around a function or a reward model."""

import hmac
import importlib
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import cast

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from actors.attempts import first_line
from minigpt_ray.config import ServeRewardConfig
from minigpt_ray.models import TokenValues, load_scalar, resolve_model
from minigpt_ray.reward_protocol import Sample, ScoreAnswer, ScoreRequest
from minigpt_ray.rl.batching import micro_batches
from minigpt_ray.tokenizer import encode_conversation, load_tokenizer

PATH = "/score"

Scorer = Callable[[list[Sample]], Sequence[float | None]]


class ModelScorer:
    """A sequence-classification checkpoint with one label, which reads conversations with its own tokenizer."""

    def __init__(self, path: str, dtype: str, micro_batch_tokens: int) -> None:
        self.tokenizer, self.budget = load_tokenizer(path), micro_batch_tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = TokenValues(load_scalar(path, dtype, seed=0)).eval().requires_grad_(False).to(self.device)

    def __call__(self, samples: list[Sample]) -> list[float]:
        """The head's output at the end token of each response."""
        conversations = [[*sample.prompt, {"role": "assistant", "content": sample.response}] for sample in samples]
        rows = [torch.from_numpy(encode_conversation(self.tokenizer, messages).token_ids) for messages in conversations]
        lengths = [len(row) for row in rows]
        scores = [0.0] * len(rows)
        for places in micro_batches(lengths, self.budget, ranks=1)[0] if rows else []:
            token_ids = torch.nn.utils.rnn.pad_sequence([rows[place] for place in places], batch_first=True).to(self.device)
            with torch.no_grad():
                values = self.model(token_ids).cpu()
            for row, place in enumerate(places):
                scores[place] = float(values[row, lengths[place]])
        return scores


def load_scorer(config: ServeRewardConfig) -> Scorer:
    """Raises ValueError or FileNotFoundError when the function or the model does not exist."""
    if config.model is not None:
        return ModelScorer(resolve_model(config.model, config.run_dir), config.dtype, config.micro_batch_tokens)
    module, _, attribute = config.function.partition(":")
    try:
        return cast(Scorer, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"function={config.function}: {error}; name it as module:function, importable from where the server starts") from error


def application(scorer: Scorer, token: str | None, max_request_bytes: int) -> FastAPI:
    """Scores one request at a time; what the scorer cannot score is answered with status 422 and its exception."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    turn = threading.Lock()

    def score(samples: list[Sample]) -> ScoreAnswer:
        with turn:
            return ScoreAnswer(scores=list(scorer(samples)))

    @app.post(PATH)
    async def answer(request: Request) -> ScoreAnswer:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_request_bytes:
                raise HTTPException(413, f"the request is larger than max_request_bytes={max_request_bytes}")
        try:
            samples = ScoreRequest.model_validate_json(bytes(body)).samples
            scored = await run_in_threadpool(score, samples)
        except ValidationError as error:
            problem = error.errors(include_input=False)[0]
            raise HTTPException(422, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
        except Exception as error:  # whatever the user's function does
            raise HTTPException(422, first_line(error)) from error
        if len(scored.scores) != len(samples):
            raise HTTPException(422, f"{len(scored.scores)} scores for {len(samples)} samples; there must be one for each, in order")
        return scored

    return app


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ValueError when the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who connects from now on waits instead of being refused
    except OSError as error:
        listener.close()
        raise ValueError(f"host={host} port={port} cannot be bound ({error.strerror or error}); choose another port=, or 0 for any that is free") from None
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer until the process is told to end."""
    host, port = listener.getsockname()[:2]
    with closing(listener):
        print(f"rewards at http://{f'[{host}]' if ':' in host else host}:{port}{PATH}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
