"""A frozen reward model: any sequence-classification checkpoint with one label."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from actors.attempts import RewardError
from actors.forward import in_micro_batches
from actors.group import Group, Pending
from actors.placement import Cluster
from actors.rank_host import Rank
from actors.reward_sources import load_calibration
from minigpt_ray.config import ModelReward
from minigpt_ray.model_directory import resolve_model
from minigpt_ray.models import TokenValues, load_scalar
from minigpt_ray.rl.experience import RolloutBatch
from minigpt_ray.tokenizer import load_tokenizer


class RewardModelRank:
    """One replica of a reward model; it reads the policy's token ids, so both must have one vocabulary: raises RewardError."""

    def __init__(self, rank: Rank, name: str, path: str, policy_path: str, config: ModelReward) -> None:
        if load_tokenizer(path).get_vocab() != load_tokenizer(policy_path).get_vocab():
            raise RewardError(f"{name}: the reward model {path} has another vocabulary than the policy {policy_path}; train one with the policy's tokenizer")
        self.rank, self.config = rank, config
        self.device = torch.device(rank.device)
        self.mean, self.std = load_calibration(name, path) if config.normalize else (0.0, 1.0)
        self.model = TokenValues(load_scalar(path, config.dtype, seed=0)).eval().requires_grad_(False).to(self.device)

    def scores(self, batch: RolloutBatch) -> Float[Tensor, "R"]:
        """The head's output at the last token of each row, normalised where configured; this rank's share of the rows."""
        with torch.no_grad():
            values = in_micro_batches(self.rank, batch, self.config.micro_batch_tokens, self.device, lambda ids, mask: self.model(ids))
        return (values.gather(1, batch.lengths[self.rank.share(len(batch))].long()[:, None])[:, 0] - self.mean) / self.std


class RewardModel(Group[RewardModelRank]):
    """One reward model as the driver sees it."""

    def __init__(self, cluster: Cluster, name: str, source: ModelReward, run_dir: Path, policy_path: str, restarts: int) -> None:
        path = resolve_model(source.init_from, run_dir)
        super().__init__(cluster, name, RewardModelRank, name, path, policy_path, source, restarts=restarts)

    def scores(self, batch: RolloutBatch) -> Pending[Float[Tensor, "B"]]:
        return self.scatter(RewardModelRank.scores, batch, torch.cat)
