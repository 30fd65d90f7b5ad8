"""Rewards, computed off the driver: verifiers, Python functions and reward models, weighted together."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from actors.group import Group, Pending, Rank
from actors.placement import Cluster
from actors.reward_model import RewardModel
from minigpt_ray.config import AnyReward, FunctionReward, ModelReward, VerifierReward
from minigpt_ray.data.verification import verify
from minigpt_ray.rl.experience import RewardScores, Rollout, RolloutBatch
from minigpt_ray.rl.rewards import combine

RewardFunction = Callable[[list[Rollout]], list[float]]


class RewardFunctions:
    """Verifiers and Python functions in a process of their own."""

    def __init__(self, rank: Rank, sources: Mapping[str, VerifierReward | FunctionReward]) -> None:
        self.functions = {name: load_function(name, source) for name, source in sources.items()}

    def score(self, rollouts: list[Rollout]) -> dict[str, list[float]]:
        """One score per rollout and source; nan where a source has none."""
        return {name: self._scores(name, function, rollouts) for name, function in self.functions.items()}

    def verify(self, rollouts: list[Rollout]) -> list[float]:
        """The verifier's score of each rollout, whatever the reward is."""
        return [_verified(rollout) for rollout in rollouts]

    @staticmethod
    def _scores(name: str, function: RewardFunction, rollouts: list[Rollout]) -> list[float]:
        scores = [float(score) for score in function(rollouts)]
        if len(scores) != len(rollouts):
            raise ValueError(f"rewards.{name}: the function gave {len(scores)} scores for {len(rollouts)} rollouts; it must give one for each, in order")
        return scores


def load_function(name: str, source: VerifierReward | FunctionReward) -> RewardFunction:
    """The function behind a source; raises ValueError when `module:function` does not exist."""
    if isinstance(source, VerifierReward):
        return _exact if source.exact_only else _partial
    module, _, attribute = source.function.partition(":")
    try:
        return cast(RewardFunction, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rewards.{name}.function={source.function}: {error}; name it as module:function, importable from where the job starts") from error


def _verified(rollout: Rollout) -> float:
    return math.nan if rollout.prompt.answer is None else verify(rollout.prompt.answer, rollout.text)


def _partial(rollouts: list[Rollout]) -> list[float]:
    return [_verified(rollout) for rollout in rollouts]


def _exact(rollouts: list[Rollout]) -> list[float]:
    return [score if math.isnan(score) else float(score == 1.0) for score in map(_verified, rollouts)]


class Rewards:
    """All reward sources as the driver sees them."""

    def __init__(self, cluster: Cluster, sources: Mapping[str, AnyReward], run_dir: Path, policy_path: str, restarts: int = 0) -> None:
        functions = {name: source for name, source in sources.items() if not isinstance(source, ModelReward)}
        models = [(name, source) for name, source in sources.items() if isinstance(source, ModelReward)]
        self.weights = {name: source.weight for name, source in sources.items()}
        self.functions = Group(cluster, "rewards", RewardFunctions, functions, restarts=restarts)
        self.models = {name: RewardModel(cluster, f"reward_model_{i}", source, run_dir, policy_path, restarts) for i, (name, source) in enumerate(models)}

    @property
    def groups(self) -> list[Group]:
        return [self.functions, *self.models.values()]

    def score(self, rollouts: Sequence[Rollout], batch: RolloutBatch) -> Pending[RewardScores]:
        """Every source's scores and their weighted sum; a rollout that a source could not score has failed."""
        functions = self.functions.first(RewardFunctions.score, list(rollouts))
        models = {name: model.scores(batch) for name, model in self.models.items()}

        def result() -> RewardScores:
            by_source = {name: torch.tensor(scores, dtype=torch.float32) for name, scores in functions.result().items()}
            by_source |= {name: pending.result() for name, pending in models.items()}
            failed = torch.stack([~torch.isfinite(scores) for scores in by_source.values()]).any(0) | ~torch.tensor([r.valid for r in rollouts])
            return combine({name: torch.where(torch.isfinite(s), s, 0.0) for name, s in by_source.items()}, self.weights, failed)

        return Pending(result)

    def verify(self, rollouts: Sequence[Rollout]) -> Pending[list[float]]:
        """Score in [0, 1] of each answer by rule, nan for prompts without one."""
        return self.functions.first(RewardFunctions.verify, list(rollouts))
