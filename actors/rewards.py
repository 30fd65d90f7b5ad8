"""Rewards, computed off the driver: verifiers, Python functions, HTTP servers and reward models, weighted together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from actors.attempts import COUNTERS, RewardError, Scored
from actors.group import Group, Pending
from actors.placement import Cluster
from actors.reward_functions import EVALUATION, RewardFunctions
from actors.reward_model import RewardModel
from actors.reward_sources import token_of
from minigpt_ray.config import AnyReward, HttpReward, ModelReward, longest_score
from minigpt_ray.rl.experience import RewardScores, RolloutBatch
from minigpt_ray.rl.rewards import combine
from minigpt_ray.rl.rollout import Rollout


class Rewards:
    """All reward sources as the driver sees them."""

    def __init__(self, cluster: Cluster, sources: Mapping[str, AnyReward], run_dir: Path, policy_path: str, restarts: int = 0) -> None:
        called = {name: source for name, source in sources.items() if not isinstance(source, ModelReward)}
        models = [(name, source) for name, source in sources.items() if isinstance(source, ModelReward)]
        tokens = {name: token_of(name, source) for name, source in sources.items() if isinstance(source, HttpReward)}
        self.sources = sources
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
        self.functions.cluster.grant("rewards", max(longest_score(source, len(rollouts)) for source in self.sources.values()))
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
