"""What the model is asked and what it answers, as a generator and the reward sources know them: without tensors.

A reward function's process reads this module, so it does not import torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and what a verifier needs to judge the answer."""

    serial: int
    """Number in the prompt stream, unique in a run; with the run's seed it fixes the sampling seeds."""
    messages: tuple[dict[str, str], ...]
    """The conversation, `{"role", "content"}`, ending with the user's turn."""
    token_ids: np.ndarray
    """int32 (prompt tokens,): the chat template applied, generation prompt included."""
    source: str
    """Where the prompt comes from; metrics are kept by source."""
    answer: dict[str, Any] | None
    """A reasoning-gym entry (`question`, `answer`, `metadata`), or `{"answer": text}`, or None."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response. A sample that the generator gave up keeps its row with valid=False."""

    prompt: Prompt
    sample: int
    """Which of the prompt's n samples; `group` is the prompt's serial number."""
    token_ids: np.ndarray
    """int32 (response tokens,): the end token included when the model wrote it."""
    model_mask: np.ndarray
    """bool (response tokens,): True where the model itself wrote the token."""
    logprobs: np.ndarray
    """float32 (response tokens,): the generator's own, at the sampling temperature."""
    weight_versions: np.ndarray
    """int32 (response tokens,): the publication that each token was drawn from."""
    text: str
    finish_reason: str
    """`stop`: the model ended; `length`: cut at the limit, a truncated response; `failed`: no engine survived the prompt, there are no tokens."""
    valid: bool = True

    @property
    def group(self) -> int:
        return self.prompt.serial

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"
