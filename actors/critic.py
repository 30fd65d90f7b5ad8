"""The critic learner: values and value updates."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actors.engine import Engine, Stats
from actors.forward import in_micro_batches
from actors.group import Group, Pending, Rank
from actors.learner import learn
from actors.placement import Cluster
from minigpt_ray.config import AlgorithmConfig, CriticConfig, PPOConfig
from minigpt_ray.losses import clipped_value_loss
from minigpt_ray.models import TokenValues, load_scalar, resolve_model
from minigpt_ray.rl.experience import Experience, RolloutBatch


class CriticRank:
    """One data-parallel rank of the critic."""

    def __init__(self, rank: Rank, path: str, config: CriticConfig, algorithm: AlgorithmConfig, total_updates: int, seed: int, refused: Path) -> None:
        """`refused` is where mini-batches are kept whose update was not finite."""
        torch.manual_seed(seed + rank.index)
        self.refused = refused
        self.rank, self.config, self.algorithm, self.seed = rank, config, algorithm, seed
        self.model = load_scalar(path, "float32", seed=None)
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.engine = Engine(TokenValues(self.model), config, config.optimizer, total_updates)

    def values(self, batch: RolloutBatch) -> Float[Tensor, "R T+1"]:
        """The estimate before every token, and after the last one; this rank's share of the rows."""
        self.model.eval()
        return in_micro_batches(self.rank, batch, self.config.micro_batch_tokens, self.engine.device, lambda ids, mask: self.engine(ids))

    def update(self, experience: Experience) -> dict[str, float]:
        """PPO epochs over the experience; metrics are token means over the mini-batches of the last epoch."""
        self.model.train()
        with self.engine.optimizer_at_hand():
            learnt = learn(self.engine, self.rank, experience, self.algorithm, self.config.micro_batch_tokens, self.seed, self.refused, self._loss)
        return {
            "train/critic_loss": learnt.stats.pop("critic_loss"),
            "train/critic_grad_norm": learnt.grad_norm,
            "train/critic_lr": learnt.lr,
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
        hosts = cluster.hosts("critic", form_group=True)
        total_updates = config.steps * config.updates_per_step
        refused = config.stage_dir("ppo") / "non_finite" / "critic"
        super().__init__(hosts, "critic", CriticRank, path, config.critic, config.algorithm, total_updates, config.seed, refused)

    def values(self, batch: RolloutBatch) -> Pending[Float[Tensor, "B T+1"]]:
        return self.scatter(CriticRank.values, batch, torch.cat)

    def update(self, experience: Experience) -> Pending[dict[str, float]]:
        return self.first(CriticRank.update, experience)

    def save(self, directory: Path) -> Pending[list[None]]:
        return self.call(CriticRank.save, directory)

    def load(self, directory: Path) -> Pending[list[None]]:
        return self.call(CriticRank.load, directory)
