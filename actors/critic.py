"""The critic learner: values and value updates; and what stands in its place where the estimator needs no critic."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actors.engine import Engine, Stats
from actors.forward import in_micro_batches
from actors.group import Group, Pending
from actors.learner import Learner
from actors.placement import Cluster
from actors.rank_host import Rank
from minigpt_ray.config import AlgorithmConfig, CriticConfig, PPOConfig
from minigpt_ray.losses import clipped_value_loss
from minigpt_ray.model_directory import resolve_model
from minigpt_ray.models import TokenValues, load_scalar
from minigpt_ray.rl.experience import Experience, RolloutBatch
from minigpt_ray.rl.metrics import value_metrics


class CriticRank:
    """One data-parallel rank of the critic."""

    def __init__(self, rank: Rank, path: str, config: CriticConfig, algorithm: AlgorithmConfig, total_updates: int, seed: int, refused: Path) -> None:
        """`refused` is where mini-batches are kept whose update was not finite."""
        torch.manual_seed(seed + rank.index)
        self.rank, self.config, self.algorithm = rank, config, algorithm
        self.model = load_scalar(path, "float32", seed=None)
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.engine = Engine(TokenValues(self.model), config, config.optimizer, total_updates)
        self.learner = Learner(self.engine, rank, algorithm, config.micro_batch_tokens, seed, refused)

    def values(self, batch: RolloutBatch) -> Float[Tensor, "R T+1"]:
        """The estimate before every token, and after the last one; this rank's share of the rows."""
        self.model.eval()
        return in_micro_batches(self.rank, batch, self.config.micro_batch_tokens, self.engine.device, lambda ids, mask: self.engine(ids))

    def update(self, experience: Experience) -> dict[str, float]:
        """PPO epochs over the experience; metrics are token means over the mini-batches of the last epoch."""
        self.model.train()
        with self.engine.optimizer_at_hand():
            learnt = self.learner.learn(experience, self._loss)
        return {
            "train/critic_loss": learnt.stats.pop("critic_loss"),
            "train/critic_grad_norm": learnt.grad_norm,
            "train/critic_lr": learnt.lr,
            "critic/updates": float(learnt.updates),
            "critic/skipped_updates": float(learnt.skipped),
            **{f"critic/{name}": value for name, value in learnt.stats.items()},
        }

    def _loss(self, model: nn.Module, part: Experience, num_tokens: int) -> tuple[Tensor, Stats]:
        values = model(part.token_ids)[:, :-1]
        loss = clipped_value_loss(values, part.values, part.returns, part.response_mask, num_tokens, self.algorithm.value_clip)
        return loss.loss, loss.stats

    def save(self, directory: Path) -> None:
        self.engine.save(directory / "critic")

    def load(self, directory: Path) -> None:
        self.engine.load(directory / "critic")


class Critic(Group[CriticRank]):
    """The critic as the driver sees it."""

    def __init__(self, cluster: Cluster, config: PPOConfig) -> None:
        source = config.policy.init_from if config.critic.init_from == "policy" else config.critic.init_from
        path = resolve_model(source, config.run_dir)
        total_updates = config.steps * config.updates_per_step
        refused = config.stage_dir("ppo") / "non_finite" / "critic"
        options = (config.critic, config.algorithm, total_updates, config.seed, refused)
        super().__init__(cluster, "critic", CriticRank, path, *options, form_group=True)

    def values(self, batch: RolloutBatch) -> Pending[Float[Tensor, "B T+1"]]:
        return self.scatter(CriticRank.values, batch, torch.cat)

    def update(self, experience: Experience) -> Pending[dict[str, float]]:
        """One update; its metrics, and those of the values that it began with."""
        return self.first(CriticRank.update, experience).then(lambda metrics: metrics | value_metrics(experience))

    def save(self, directory: Path) -> Pending[list[None]]:
        return self.call(CriticRank.save, directory)

    def load(self, directory: Path) -> Pending[list[None]]:
        return self.call(CriticRank.load, directory)


class NoCritic(Critic):
    """In the critic's place for an estimator that needs none: no process, values of 0, nothing to learn, save or measure."""

    def __init__(self, cluster: Cluster) -> None:
        Group.__init__(self, cluster, "critic", CriticRank)

    def start(self) -> None:
        """There is nothing to start."""
        self.hosts, self._building = [], []

    def values(self, batch: RolloutBatch) -> Pending[Float[Tensor, "B T+1"]]:
        size, width = batch.token_ids.shape
        return Pending.done(torch.zeros(size, width + 1))

    def update(self, experience: Experience) -> Pending[dict[str, float]]:
        return Pending.done({})

    def save(self, directory: Path) -> Pending[list[None]]:
        return Pending.done([])

    def load(self, directory: Path) -> Pending[list[None]]:
        return Pending.done([])

    def usage_metrics(self, seconds: float) -> dict[str, float]:
        return {}


def start_critic(cluster: Cluster, config: PPOConfig) -> Critic:
    """The critic, where the estimator uses one."""
    return Critic(cluster, config) if config.algorithm.uses_critic else NoCritic(cluster)
