"""The process of the reward sources: verifiers, Python functions and servers. Imports neither torch nor transformers, so that it starts soon."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from actors.attempts import Fault, Scored, Source, Tally, first_line
from actors.rank_host import Rank
from actors.reward_http import RewardServer
from actors.reward_process import FunctionProcess
from minigpt_ray.config import FunctionReward, HttpReward, VerifierReward
from minigpt_ray.data.verification import verify
from minigpt_ray.rl.rollout import Rollout

EVALUATION = "evaluation"
"""The name under which calls of the verifier that measures accuracy are counted."""

Called = VerifierReward | FunctionReward | HttpReward


class RewardFunctions:
    """Verifiers, Python functions and servers, called from a process of their own."""

    def __init__(self, rank: Rank, sources: Mapping[str, Called], tokens: Mapping[str, str | None]) -> None:
        """`tokens` has an entry for every server. Raises RewardError when a function does not exist."""
        self.sources = {name: self._source(name, source, tokens) for name, source in sources.items()}
        self.threads = ThreadPoolExecutor(len(sources) or 1)  # for good: a function's process dies with the thread that started it
        functions = [source.call for source in self.sources.values() if isinstance(source.call, FunctionProcess)]
        for function in functions:
            function.ready()
        self.verifier = _verifier(VerifierReward(), "the verifier of evaluations", "remove such prompts from the held-out set")

    @staticmethod
    def _source(name: str, source: Called, tokens: Mapping[str, str | None]) -> Source:
        label = f"rewards.{name}"
        or_allow = {limit: f"or raise {label}.{limit}" for limit in ("max_errors", "max_outages")}
        if isinstance(source, VerifierReward):
            return _verifier(source, label, f"remove such prompts, {or_allow['max_errors']}")
        if isinstance(source, FunctionReward):
            function = FunctionProcess(name, source.function, source.timeout_s)
            slow = f"make the function faster, raise {label}.timeout_s, {or_allow['max_outages']}"
            remedies = {"max_errors": f"mend {source.function}, {or_allow['max_errors']}", "max_outages": slow}
            return Source(Tally(label, source, remedies), function, source.retries, source.batch_size, concurrency=1, backoff_s=0)
        absent = f"see to the server, raise {label}.timeout_s or {label}.retries, {or_allow['max_outages']}"
        remedies = {"max_errors": f"mend the server, {or_allow['max_errors']}", "max_outages": absent}
        server = RewardServer(source, tokens[name])
        return Source(Tally(label, source, remedies), server, source.retries, source.batch_size, source.concurrency, source.backoff_s)

    def score(self, rollouts: list[Rollout]) -> dict[str, Scored]:
        """What every source says; all are asked at once, so that the slowest one sets the time."""
        return dict(zip(self.sources, self.threads.map(lambda source: source.score(rollouts), self.sources.values()), strict=True))

    def verify(self, rollouts: list[Rollout]) -> dict[str, Scored]:
        """The verifier's score of each rollout, whatever the reward is."""
        return {EVALUATION: self.verifier.score(rollouts)}


def _verifier(config: VerifierReward, label: str, remedy: str) -> Source:
    call = _exact if config.exact_only else _partial
    return Source(Tally(label, config, {"max_errors": remedy}), call, config.retries, batch_size=1, concurrency=1, backoff_s=0)


def _partial(rollouts: list[Rollout]) -> list[float]:
    try:
        return [math.nan if rollout.prompt.answer is None else verify(rollout.prompt.answer, rollout.text) for rollout in rollouts]
    except Exception as error:  # a rule that meets a text it was not made for
        raise Fault("errors", first_line(error)) from error


def _exact(rollouts: list[Rollout]) -> list[float]:
    return [score if math.isnan(score) else float(score == 1.0) for score in _partial(rollouts)]
