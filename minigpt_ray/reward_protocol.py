"""What travels between a job and a reward server: POST ScoreRequest as JSON, answered by ScoreAnswer, status 200.

A job asks for the scores of no samples before it starts, so an empty list must be answered by an empty list. A status of
500 and above, 429 and 408 say that the server is in trouble; any other but 200 that it will not score these samples.
"""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from minigpt_ray.data.verification import verify
from minigpt_ray.rl.rollout import Rollout


class Sample(BaseModel):
    """One response to score."""

    prompt: list[dict[str, str]]
    """The conversation, `{"role", "content"}`, that ends with the user's turn."""
    response: str
    answer: dict[str, Any] | None
    """What a verifier needs: a reasoning-gym entry, `{"answer": text}`, `{"answer": text, "match": "number"}`, or null."""
    source: str
    """Where the prompt comes from."""


class ScoreRequest(BaseModel):
    """Responses to score together."""

    samples: list[Sample]


class ScoreAnswer(BaseModel):
    """One score for each sample, in order; null where there is none. Other fields are ignored."""

    scores: list[Annotated[float, Field(strict=True, allow_inf_nan=False)] | None]


def request_of(rollouts: Iterable[Rollout]) -> ScoreRequest:
    """The request for the scores of rollouts."""
    return ScoreRequest(samples=[Sample(prompt=list(r.prompt.messages), response=r.text, answer=r.prompt.answer, source=r.prompt.source) for r in rollouts])


def by_rule(samples: list[Sample]) -> list[float | None]:
    """The score of the rule that each sample's answer stands for; null without an answer."""
    return [None if sample.answer is None else verify(sample.answer, sample.response) for sample in samples]
