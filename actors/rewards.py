"""Rewards, computed off the driver: verifiers, Python functions, HTTP servers and reward models, weighted together."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from actors.attempts import COUNTERS, Fault, Scored, Source, Tally, first_line
from actors.group import Group, Pending, Rank
from actors.placement import Cluster
from actors.reward_http import RewardServer
from actors.reward_model import RewardModel
from actors.reward_process import FunctionProcess
from actors.reward_sources import token_of
from minigpt_ray.config import AnyReward, FunctionReward, HttpReward, ModelReward, VerifierReward
from minigpt_ray.data.verification import verify
from minigpt_ray.rl.experience import RewardScores, Rollout, RolloutBatch
from minigpt_ray.rl.rewards import combine

EVALUATION = "evaluation"
"""The name under which calls of the verifier that measures accuracy are counted."""

Called = VerifierReward | FunctionReward | HttpReward


class RewardError(ValueError):
    """Too many rollouts stayed without a score: one sentence with source, share, last failure and remedy."""


class RewardFunctions:
    """Verifiers, Python functions and servers, called from a process of their own."""

    def __init__(self, rank: Rank, sources: Mapping[str, Called], tokens: Mapping[str, str | None]) -> None:
        """`tokens` has an entry for every server. Raises ValueError when a function does not exist."""
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


class Rewards:
    """All reward sources as the driver sees them."""

    def __init__(self, cluster: Cluster, sources: Mapping[str, AnyReward], run_dir: Path, policy_path: str, restarts: int = 0) -> None:
        called = {name: source for name, source in sources.items() if not isinstance(source, ModelReward)}
        models = [(name, source) for name, source in sources.items() if isinstance(source, ModelReward)]
        tokens = {name: token_of(name, source) for name, source in sources.items() if isinstance(source, HttpReward)}
        self.weights = {name: source.weight for name, source in sources.items()}
        self.functions = Group(cluster, "rewards", RewardFunctions, called, tokens, restarts=restarts)
        self.models = {name: RewardModel(cluster, f"reward_model_{i}", source, run_dir, policy_path, restarts) for i, (name, source) in enumerate(models)}
        self.counts = Counter({f"{name}/{counter}": 0 for name in (*called, EVALUATION) for counter in COUNTERS})
        self.counts.update({f"{name}/unscored": 0 for name in sources})

    @property
    def groups(self) -> list[Group]:
        return [self.functions, *self.models.values()]

    def score(self, rollouts: Sequence[Rollout], batch: RolloutBatch) -> Pending[RewardScores]:
        """Every source's scores and their weighted sum; a rollout that a source could not score has failed.

        Raises RewardError when a source could not score too many of them.
        """
        called = self.functions.first(RewardFunctions.score, list(rollouts)).then(self._scores)
        models = {name: model.scores(batch) for name, model in self.models.items()}

        def result() -> RewardScores:
            by_source = {name: torch.tensor(scores, dtype=torch.float32) for name, scores in called.result().items()}
            by_source |= {name: pending.result() for name, pending in models.items()}
            missing = {name: ~torch.isfinite(scores) for name, scores in by_source.items()}
            valid = torch.tensor([rollout.valid for rollout in rollouts])
            self.counts.update({f"{name}/unscored": int((rows & valid).sum()) for name, rows in missing.items()})
            failed = torch.stack(list(missing.values())).any(0) | ~valid
            return combine({name: torch.where(missing[name], 0.0, scores) for name, scores in by_source.items()}, self.weights, failed)

        return Pending(result)

    def verify(self, rollouts: Sequence[Rollout]) -> Pending[list[float]]:
        """Score in [0, 1] of each answer by rule, nan for prompts without one. Raises RewardError."""
        return self.functions.first(RewardFunctions.verify, list(rollouts)).then(self._scores).then(lambda scores: scores[EVALUATION])

    def _scores(self, by_source: dict[str, Scored]) -> dict[str, list[float]]:
        """The scores alone, once their calls are counted; raises RewardError."""
        for name, scored in by_source.items():
            self.counts.update({f"{name}/{counter}": number for counter, number in scored.calls.items()})
        for scored in by_source.values():
            if scored.too_many:
                raise RewardError(scored.too_many)
        return {name: scored.scores for name, scored in by_source.items()}

    def metrics(self) -> dict[str, float]:
        """Failed and repeated calls, and rollouts without a score, by source; evaluations included, since this process began."""
        return {f"reward_calls/{name}": float(number) for name, number in self.counts.items()}
