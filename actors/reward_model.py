"""A frozen reward model: any sequence-classification checkpoint with one label."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from actors.forward import in_micro_batches
from actors.group import Group, Pending, Rank
from actors.placement import Cluster
from minigpt_ray.config import ModelReward
from minigpt_ray.models import VALIDATION, TokenValues, load_scalar, resolve_model
from minigpt_ray.rl.experience import RolloutBatch
from minigpt_ray.tokenizer import load_tokenizer


def load_calibration(name: str, path: str) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's scores of held-out answers. Raises ValueError where its directory does not say."""
    file = Path(path) / VALIDATION
    measured = json.loads(file.read_text()) if file.is_file() else {}
    found = [measured.get(f"validation/{moment}", 0.0) for moment in ("reward_mean", "reward_std")]
    if not found[1] > 0:
        raise ValueError(f"{name}: normalize=true, but {file} holds no spread of held-out rewards; train with jobs.reward_model, or set normalize=false")
    return found[0], found[1]


class RewardModelRank:
    """One replica of a reward model; it reads the policy's token ids, so both must have one vocabulary."""

    def __init__(self, rank: Rank, name: str, path: str, policy_path: str, config: ModelReward) -> None:
        if load_tokenizer(path).get_vocab() != load_tokenizer(policy_path).get_vocab():
            raise ValueError(f"{name}: the reward model {path} has another vocabulary than the policy {policy_path}; train one with the policy's tokenizer")
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
