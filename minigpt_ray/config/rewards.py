"""Reward sources, chosen by `kind`."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from minigpt_ray.config.base import Config

LONGEST_WAIT_S = 30.0
"""Between two attempts, however many there were."""
START_AGAIN_S = 60.0
"""How long the process of a function may take to start again, the imports of its module included."""


class RewardSource(Config):
    """What every reward source has."""

    weight: float = 1.0
    """Weight in the sum."""


class CalledReward(RewardSource):
    """A source whose calls may fail: repeated, then without a score for those rollouts, and the run stops when they are too many."""

    retries: NonNegativeInt = 2
    """Repetitions of a call that failed. After them the rollouts of a batch are scored one by one, once each, so that only the guilty ones stay without a score."""
    max_errors: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the newest rollouts (100, or all that are scored together if more) that may stay without a score because the source raised an error or gave no valid answer; more stop the run."""
    max_outages: float = Field(default=0.1, ge=0, le=1)
    """The same for those whose scoring took too long, whose process died or whose server could not be reached."""


class VerifierReward(CalledReward):
    """The rule of the prompt's answer (reasoning-gym's own check, same text, same number), in [0, 1]."""

    kind: Literal["verifier"] = "verifier"
    """`verifier`"""
    exact_only: bool = False
    """Count only a full score: partial credit becomes 0."""


class FunctionReward(CalledReward):
    """A Python function `(rollouts: list[Rollout]) -> list[float]`, run in its own process; nan where there is no score."""

    kind: Literal["function"] = "function"
    """`function`"""
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one call may take; then its process is killed and started again."""
    batch_size: PositiveInt | None = None
    """Rollouts of one call; none: all of them."""


class HttpReward(CalledReward):
    """A server that answers POST {"samples": [{"prompt", "response", "answer", "source"}, ...]} with {"scores": [number or null, ...]}."""

    kind: Literal["http"] = "http"
    """`http`"""
    url: str = Field(pattern=r"^https?://[^\s/@?#]+(/[^\s@]*)?$")
    """Where samples are posted to, without credentials. It is asked for the scores of no samples before the job starts; redirects are not followed."""
    token_env: str | None = None
    """Environment variable, where the job starts, that holds a bearer token for the server."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one request may take, from connecting to the last byte."""
    backoff_s: NonNegativeFloat = 0.5
    """Seconds before the first repetition of a request; they double with each."""
    batch_size: PositiveInt = 32
    """Samples of one request."""
    concurrency: PositiveInt = 4
    """Requests under way at a time."""
    max_response_bytes: PositiveInt = 1 << 20
    """Largest answer that is read."""


class ModelReward(RewardSource):
    """A sequence-classification checkpoint with one label."""

    kind: Literal["model"] = "model"
    """`model`"""
    init_from: str
    """A stage of this run, a local directory or a hub id."""
    normalize: bool = False
    """Take (score - mean) / standard deviation, those of held-out answers, which jobs.reward_model saves with its model (validation.json)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens, padding included, that one forward holds."""


def longest_score(source: RewardSource, rollouts: int) -> float:
    """Seconds that a source may take, at worst, for so many rollouts: for each batch all attempts on the whole of it, then one on each rollout."""
    if not isinstance(source, FunctionReward | HttpReward):
        return 0.0
    batch = min(source.batch_size or rollouts, rollouts)
    concurrency, backoff, start = (source.concurrency, source.backoff_s, 0.0) if isinstance(source, HttpReward) else (1, 0.0, START_AGAIN_S)
    waits = sum(min(backoff * 2**attempt, LONGEST_WAIT_S) for attempt in range(source.retries))
    turns = math.ceil(math.ceil(rollouts / max(1, batch)) / concurrency)
    return turns * ((1 + source.retries + batch) * (source.timeout_s + start) + waits)


AnyReward = Annotated[VerifierReward | FunctionReward | ModelReward | HttpReward, Field(discriminator="kind")]
