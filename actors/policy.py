"""The policy learner: logprobs, PPO updates, publication of weights."""

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
from actors.weights import TRANSPORTS, Probe, Publication, probe_tokens
from minigpt_ray.config import AlgorithmConfig, PolicyConfig, PPOConfig
from minigpt_ray.losses import policy_loss
from minigpt_ray.model_directory import resolve_model, written_whole
from minigpt_ray.models import TokenLogprobs, as_saved, export, load_causal
from minigpt_ray.rl.experience import Experience, RolloutBatch
from minigpt_ray.tokenizer import load_tokenizer


class PolicyRank:
    """One data-parallel rank of the policy."""

    def __init__(
        self,
        rank: Rank,
        path: str,
        config: PolicyConfig,
        algorithm: AlgorithmConfig,
        temperature: float,
        total_updates: int,
        seed: int,
        refused: Path,
        transport: str = "object_store",
    ) -> None:
        """`refused` is where mini-batches are kept whose update was not finite."""
        torch.manual_seed(seed + rank.index)
        self.rank, self.path, self.config, self.algorithm, self.temperature = rank, path, config, algorithm, temperature
        self.model = load_causal(path, "float32")
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.engine = Engine(TokenLogprobs(self.model), config, config.optimizer, total_updates)
        self.learner = Learner(self.engine, rank, algorithm, config.micro_batch_tokens, seed, refused)
        self.transport = TRANSPORTS[transport]()

    def logprobs(self, batch: RolloutBatch) -> Float[Tensor, "R T"]:
        """log p(token t | tokens < t) at the sampling temperature, 0 outside the response; this rank's share of the rows."""
        self.model.eval()
        return in_micro_batches(
            self.rank, batch, self.config.micro_batch_tokens, self.engine.device, lambda ids, mask: self.engine(ids, mask, self.temperature)[0]
        )

    def update(self, experience: Experience) -> dict[str, float]:
        """PPO epochs over the experience; metrics are token means over the mini-batches of the last epoch."""
        if experience.step < self.algorithm.critic_warmup_steps:
            train = ("train/actor_loss", "train/kl", "train/actor_grad_norm", "train/actor_lr")
            return dict.fromkeys((*train, "policy/updates", "policy/skipped_updates", "policy/early_stopped"), 0.0)
        self.model.train()
        with self.engine.optimizer_at_hand():
            learnt = self.learner.learn(experience, self._loss, self._too_far)
        return {
            "train/actor_loss": learnt.stats.pop("actor_loss"),
            "train/kl": learnt.stats.pop("kl"),
            "train/actor_grad_norm": learnt.grad_norm,
            "train/actor_lr": learnt.lr,
            "policy/updates": float(learnt.updates),
            "policy/skipped_updates": float(learnt.skipped),
            "policy/early_stopped": float(learnt.stopped),
            **{f"policy/{name}": value for name, value in learnt.stats.items()},
        }

    def _loss(self, model: nn.Module, part: Experience, num_tokens: int) -> tuple[Tensor, Stats]:
        logprobs, entropy = model(part.token_ids, part.response_mask, self.temperature)
        loss = policy_loss(logprobs, entropy, part, num_tokens, self.algorithm)
        return loss.loss, loss.stats

    def _too_far(self, stats: dict[str, float]) -> bool:
        return self.algorithm.kl_stop is not None and stats["kl"] > self.algorithm.kl_stop

    def publish(self, version: int, bucket_bytes: int) -> Publication | None:
        """Make the weights known to the generator; rank 0 returns the publication, the others take part in gathering."""
        self.model.eval()
        tokens = probe_tokens(self.model.config.vocab_size)
        ids = torch.tensor([tokens], device=self.engine.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        logprobs = self.engine(ids, mask)[0][0, 1:].tolist()
        weights = as_saved(self.model, self.engine.named_weights(self.model))
        if self.rank.index > 0:
            for _ in weights:
                pass
            return None
        return self.transport.publish(version, weights, bucket_bytes, Probe(tokens, tuple(logprobs)))

    def save(self, directory: Path) -> None:
        self.engine.save(directory / "policy")

    def load(self, directory: Path) -> None:
        self.engine.load(directory / "policy")

    def export(self, directory: Path) -> None:
        """Write a Hugging Face directory, whole or not at all (rank 0); the others take part in gathering. Raises ExportError."""
        weights = {name: tensor.cpu().clone() for name, tensor in self.engine.named_weights(self.model) if self.rank.index == 0}
        if self.rank.index == 0:
            with written_whole(directory) as partial:
                export(self.model, load_tokenizer(self.path), partial, weights)


class Policy(Group[PolicyRank]):
    """The policy as the driver sees it."""

    def __init__(self, cluster: Cluster, config: PPOConfig) -> None:
        path = resolve_model(config.policy.init_from, config.run_dir)
        learning_steps = max(1, config.steps - config.algorithm.critic_warmup_steps)
        total_updates = learning_steps * config.updates_per_step
        temperature, transport = config.sampling.temperature, config.weights.transport
        refused = config.stage_dir("ppo") / "non_finite" / "policy"
        options = (config.policy, config.algorithm, temperature, total_updates, config.seed, refused, transport)
        super().__init__(cluster, "policy", PolicyRank, path, *options, form_group=True)
        self._bucket_bytes = config.weights.bucket_mib << 20

    def logprobs(self, batch: RolloutBatch) -> Pending[Float[Tensor, "B T"]]:
        return self.scatter(PolicyRank.logprobs, batch, torch.cat)

    def update(self, experience: Experience) -> Pending[dict[str, float]]:
        return self.first(PolicyRank.update, experience)

    def publish(self, version: int) -> Publication:
        publication = self.first(PolicyRank.publish, version, self._bucket_bytes).result()
        assert publication is not None
        return publication

    def save(self, directory: Path) -> Pending[list[None]]:
        return self.call(PolicyRank.save, directory)

    def load(self, directory: Path) -> Pending[list[None]]:
        return self.call(PolicyRank.load, directory)

    def export(self, directory: Path) -> None:
        self.call(PolicyRank.export, directory).result()
