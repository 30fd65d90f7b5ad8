"""A reward server: the protocol of minigpt_ray/reward_protocol.py around a function or a reward model."""

import hmac
import importlib
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import cast

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from actors.attempts import first_line
from minigpt_ray.config import ServeRewardConfig
from minigpt_ray.model_directory import resolve_model
from minigpt_ray.reward_protocol import Sample, ScoreAnswer, ScoreRequest

PATH = "/score"

Scorer = Callable[[list[Sample]], Sequence[float | None]]


def load_scorer(config: ServeRewardConfig) -> Scorer:
    """Raises ValueError or FileNotFoundError when the function or the model does not exist."""
    if config.model is not None:
        path = resolve_model(config.model, config.run_dir)
        from actors.model_scorer import ModelScorer  # imports torch, for which neither a missing model nor a function waits

        return ModelScorer(path, config.dtype, config.micro_batch_tokens)
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
