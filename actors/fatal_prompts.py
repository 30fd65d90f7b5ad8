"""Prompts of which generator workers die: a fault of data, which returns with the prompt, so it has a limit of its own.

Which prompt it is, actors/dispatch.py finds out.
"""

from minigpt_ray.rl.rollout import Prompt

EXCERPT = 80
"""Characters of a prompt that name it."""


class FatalPrompts(RuntimeError):
    """Generator workers die of more prompts than may be given up."""

    def __init__(self, named: str, limit: int) -> None:
        super().__init__(
            f"{named}; that is one more than generator.fatal_prompt_limit={limit} allows between two checkpoints: the cause stands in the workers' logs; "
            "raise the limit and go on (PPO: with checkpoint.resume=auto), or take such prompts out of the data and begin another run"
        )


class GivenUp:
    """The prompts that nobody is asked for any more, known by their tokens; at most `limit` more until `refill`."""

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit
        self._tokens: set[bytes] = set()

    def refill(self) -> None:
        """The run has got further, so as many may be given up again."""
        self._left = self._limit

    def add(self, prompt: Prompt) -> str:
        """Workers died of a prompt; what there is to say of it. Raises FatalPrompts when there were too many."""
        self._tokens.add(prompt.token_ids.tobytes())
        begin = str(prompt.messages[-1]["content"])[:EXCERPT]
        named = f"generator workers die of a prompt of {prompt.source}, {len(prompt.token_ids)} tokens, that begins with {begin!r}"
        if self._left == 0:
            raise FatalPrompts(named, self._limit)
        self._left -= 1
        return f"{named}; it gets no answers from now on, and nothing is learnt from it ({self._left} more may be given up until the next checkpoint)"

    def __contains__(self, prompt: Prompt) -> bool:
        return bool(self._tokens) and prompt.token_ids.tobytes() in self._tokens

    def __len__(self) -> int:
        return len(self._tokens)
