"""Policy and critic ranks without Ray: an update does what its loss says, however it is cut into micro-batches and ranks."""

import math
import os
import resource
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.critic import CriticRank, NoCritic
from actors.placement import Cluster
from actors.policy import PolicyRank
from actors.rank_host import Rank, RankHost
from minigpt_ray.config import AlgorithmConfig, CriticConfig, OptimizerConfig, PlacementConfig, PolicyConfig
from minigpt_ray.model_directory import ExportError
from minigpt_ray.models import TokenLogprobs, TokenValues, export, load_causal, load_scalar
from minigpt_ray.rl.experience import Experience, RolloutBatch
from minigpt_ray.tokenizer import load_tokenizer
from tests.actors.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("alone")

LENGTHS = (9, 14, 6, 11, 14, 8, 7, 12, 10)
PROMPT = 4
# A large epsilon makes Adam's first steps as smooth as the gradient: float noise cannot turn into a change of sign.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3)
# So large an epsilon, and a rate as large, make AdamW's first step the gradient itself: lr * g / (|g| + eps).
PLAIN = OptimizerConfig(lr=1e4, eps=1e4, max_grad_norm=1e6)
# Nine rollouts in mini-batches of four: the last has one row, so that of two ranks one has none.
ALGORITHM = AlgorithmConfig(ppo_epochs=2, mini_batch_size=4, value_clip=None)
# Every term that the policy's loss can have, and an early stop in the second epoch.
EVERYTHING = ALGORITHM.model_copy(update={"clip_high": 0.3, "dual_clip": 1.5, "entropy_coef": 0.01, "kl_in": "loss", "kl_estimator": "k2", "kl_stop": 0.05})
WHOLE = AlgorithmConfig(mini_batch_size=len(LENGTHS), value_clip=None)


def batch() -> RolloutBatch:
    """Rollouts of several lengths, prompts of PROMPT tokens, the second one truncated, the third one dropped."""
    torch.manual_seed(1)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    columns = torch.arange(max(LENGTHS))
    inside = columns < lengths[:, None]
    mask = inside & (columns >= PROMPT)
    mask[2] = False
    size = len(LENGTHS)
    return RolloutBatch(
        token_ids=(torch.randint(260, inside.shape) * inside).int(),
        prompt_lengths=torch.full((size,), PROMPT, dtype=torch.int32),
        lengths=lengths,
        response_mask=mask,
        truncated=torch.arange(size) == 1,
        groups=torch.arange(size, dtype=torch.int32),
        generator_logprobs=torch.zeros(inside.shape),
        weight_versions=torch.zeros(inside.shape, dtype=torch.int32),
    )


def experience(logprobs: Tensor, advantages: Tensor | float, step: int = 0) -> Experience:
    rollouts = batch()
    mask = rollouts.response_mask
    zeros = torch.zeros(mask.shape)
    torch.manual_seed(2)
    return Experience(
        token_ids=rollouts.token_ids,
        lengths=rollouts.lengths,
        response_mask=mask,
        logprobs=logprobs,
        reference_logprobs=0.9 * logprobs,
        values=zeros,
        advantages=torch.where(mask, torch.as_tensor(advantages), zeros),
        returns=torch.where(mask, torch.randn(mask.shape), zeros),
        kl_coef=0.1,
        step=step,
    )


def varied() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(len(LENGTHS), max(LENGTHS))


def policy_rank(path: Path, rank: Rank = Rank(0, 1, "cpu"), algorithm: AlgorithmConfig = ALGORITHM, temperature: float = 1.0, **changes: object) -> PolicyRank:
    return PolicyRank(rank, str(path), PolicyConfig(**{"optimizer": OPTIMIZER, **changes}), algorithm, temperature, 100, 0, path / "refused")


def critic_rank(path: Path, rank: Rank = Rank(0, 1, "cpu"), algorithm: AlgorithmConfig = ALGORITHM, **changes: object) -> CriticRank:
    return CriticRank(rank, str(path / "critic"), CriticConfig(**{"optimizer": OPTIMIZER, **changes}), algorithm, 100, 0, path / "refused")


def weights_of(rank: PolicyRank | CriticRank) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in rank.engine.named_weights(rank.model)}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a.keys() | b.keys())


def course(path: Path, rank: Rank, **changes: object) -> dict[str, object]:
    """One step of policy and critic with the given engine settings: what they say before, report, and end with."""
    policy, critic = policy_rank(path, rank, EVERYTHING, **changes), critic_rank(path, rank, EVERYTHING, **changes)
    everything = policy_rank(path, Rank(0, 1, "cpu")).logprobs(batch()) if rank.world == 1 else torch.load(path / "logprobs.pt")
    taken = experience(everything, varied())
    return {
        "logprobs": policy.logprobs(batch()),
        "values": critic.values(batch()),
        "policy": policy.update(taken),
        "critic": critic.update(taken),
        "policy_weights": weights_of(policy),
        "critic_weights": weights_of(critic),
        "policy_gradient": gradient_of(policy_rank(path, rank, WHOLE, **changes, optimizer=PLAIN), taken),
        "critic_gradient": gradient_of(critic_rank(path, rank, WHOLE, **changes, optimizer=PLAIN), taken),
    }


def gradient_of(rank: PolicyRank | CriticRank, taken: Experience) -> dict[str, Tensor]:
    """What one update on all rollouts goes by."""
    before = weights_of(rank)
    rank.update(taken)
    after = weights_of(rank)
    return {name: before[name] - after[name] for name in before}


def process(index: int, path: Path, port: int) -> None:
    """One of two ranks; what it found goes to a file."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_ACCELERATOR_LOG_LEVEL": "ERROR"}
    host = RankHost(index, 2, device="cpu")
    host.join("127.0.0.1", port, hang_after_s=60)
    torch.save(course(path, host.rank), path / f"rank-{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def nano(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy, and below it a critic whose head is not zero any more, so that all of its weights learn."""
    directory = tmp_path_factory.mktemp("learners")
    shutil.copytree(nano, directory, dirs_exist_ok=True)
    export(load_scalar(str(nano), "float32", seed=0), load_tokenizer(nano), directory / "critic")
    return directory


@pytest.fixture(scope="module")
def one_rank(nano: Path) -> dict[str, object]:
    return course(nano, Rank(0, 1, "cpu"))


@pytest.fixture(scope="module")
def two_ranks(nano: Path, one_rank: dict[str, object]) -> list[dict[str, object]]:
    torch.save(one_rank["logprobs"], nano / "logprobs.pt")
    run_ranks(process, (nano, free_port()), 2)
    return [torch.load(nano / f"rank-{index}.pt", weights_only=False) for index in range(2)]


# ----------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 30, 8192])
def test_logprobs_are_those_of_the_whole_batch_at_the_temperature(nano: Path, temperature: float, budget: int) -> None:
    rank = policy_rank(nano, temperature=temperature, micro_batch_tokens=budget)
    found = rank.logprobs(batch())
    expected, _ = TokenLogprobs(load_causal(str(nano), "float32").eval())(batch().token_ids, batch().response_mask, temperature)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found[~batch().response_mask].any()


@pytest.mark.parametrize("budget", [1, 8192])
def test_values_have_a_column_for_the_estimate_after_the_last_token(nano: Path, budget: int) -> None:
    values = critic_rank(nano, micro_batch_tokens=budget).values(batch())
    model = load_scalar(str(nano / "critic"), "float32", seed=None).eval()
    assert values.shape == (len(LENGTHS), max(LENGTHS) + 1)
    assert not values[:, 0].any()
    for row, length in enumerate(LENGTHS):
        alone = batch().token_ids[row : row + 1, :length]
        assert torch.allclose(values[row, : length + 1], TokenValues(model)(alone)[0], atol=1e-5)
        assert values[row, length] == pytest.approx(model(alone, use_cache=False).logits.item(), abs=1e-5)  # the head at the last token: the bootstrap


def test_a_critic_that_begins_as_the_policys_trunk_expects_nothing(nano: Path) -> None:
    rank = CriticRank(Rank(0, 1, "cpu"), str(nano), CriticConfig(optimizer=OPTIMIZER), ALGORITHM, 100, 0, nano / "refused")
    assert not rank.values(batch()).any()
    rank.update(experience(torch.zeros(len(LENGTHS), max(LENGTHS)), 0.0))
    assert rank.values(batch()).any()


def test_an_update_raises_the_logprob_of_tokens_with_a_positive_advantage_and_lowers_the_others(nano: Path) -> None:
    rank = policy_rank(nano)
    before = rank.logprobs(batch())
    mask = batch().response_mask
    sign = torch.where(torch.arange(len(LENGTHS)) % 2 == 0, 1.0, -1.0)[:, None].expand(mask.shape)
    metrics = rank.update(experience(before, sign))
    moved = (rank.logprobs(batch()) - before) * sign
    assert float(moved[mask].mean()) > 0.1
    assert metrics["train/kl"] > 0 and metrics["train/actor_grad_norm"] > 0
    assert metrics["train/actor_lr"] == OPTIMIZER.lr


def test_the_first_update_starts_from_a_ratio_of_one(nano: Path) -> None:
    rank = policy_rank(nano, algorithm=AlgorithmConfig(mini_batch_size=len(LENGTHS)))
    mask, advantages = batch().response_mask, varied()
    metrics = rank.update(experience(rank.logprobs(batch()), advantages))
    assert metrics["train/actor_loss"] == pytest.approx(-float(advantages[mask].mean()), abs=1e-5)
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_fraction_low"] == metrics["policy/clip_fraction_high"] == 0


def test_values_move_to_the_returns(nano: Path) -> None:
    rank = critic_rank(nano, optimizer=OptimizerConfig(lr=1e-3))
    mask = batch().response_mask
    taken = replace(experience(torch.zeros(mask.shape), 0.0), returns=mask.float())

    def error() -> float:
        return float((rank.values(batch())[:, :-1] - taken.returns)[mask].square().mean() / 2)

    before = error()
    metrics = rank.update(taken)
    assert error() < 0.9 * before
    assert metrics["train/critic_lr"] == 1e-3 and metrics["train/critic_grad_norm"] > 0


def test_in_the_critics_warm_up_the_policy_stays_as_it_is(nano: Path) -> None:
    rank = policy_rank(nano, algorithm=ALGORITHM.model_copy(update={"critic_warmup_steps": 2}))
    before = weights_of(rank)
    logprobs = rank.logprobs(batch())
    for step in (0, 1):
        metrics = rank.update(experience(logprobs, 1.0, step))
        assert set(metrics.values()) == {0.0}
        assert difference(weights_of(rank), before) == 0
    assert rank.update(experience(logprobs, 1.0, step=2)).keys() > metrics.keys()
    assert difference(weights_of(rank), before) > 0


# --------------------------------------------------------------------------------------------------- early stop


def test_an_early_stop_makes_neither_that_update_nor_one_after_it(nano: Path) -> None:
    """The second epoch begins beyond the bound: the step is one of a single epoch, schedule included, and so is the next step."""
    optimizer = OPTIMIZER.model_copy(update={"warmup_steps": 5, "lr": 2e-2})
    stopped = policy_rank(nano, algorithm=ALGORITHM.model_copy(update={"kl_stop": 0.05}), optimizer=optimizer)
    single = policy_rank(nano, algorithm=ALGORITHM.model_copy(update={"ppo_epochs": 1}), optimizer=optimizer)
    taken = experience(stopped.logprobs(batch()), varied())
    first = stopped.update(taken)
    assert (first["policy/updates"], first["policy/early_stopped"], first["policy/skipped_updates"]) == (3, 1, 0)
    assert first["train/actor_lr"] == pytest.approx(2e-2 * 3 / 5)
    assert first | {"policy/early_stopped": 0} == single.update(taken)
    assert difference(weights_of(stopped), weights_of(single)) == 0
    again = experience(stopped.logprobs(batch()), varied(), step=1)
    assert stopped.update(again)["train/actor_lr"] == single.update(again)["train/actor_lr"] == 2e-2


def test_a_bound_that_is_not_reached_stops_nothing(nano: Path) -> None:
    bounded, free = (policy_rank(nano, algorithm=ALGORITHM.model_copy(update={"kl_stop": bound})) for bound in (1e3, None))
    taken = experience(free.logprobs(batch()), varied())
    metrics = bounded.update(taken)
    assert metrics == free.update(taken) and (metrics["policy/updates"], metrics["policy/early_stopped"]) == (6, 0)


def test_kl_in_the_loss_draws_the_policy_back_to_the_reference(nano: Path) -> None:
    """Without advantages the KL is all there is to learn from."""
    rank = policy_rank(nano, algorithm=ALGORITHM.model_copy(update={"kl_in": "loss", "kl_estimator": "k2"}))
    before, mask = rank.logprobs(batch()), batch().response_mask
    reference = torch.where(mask, before + 0.5 * varied(), 0)
    rank.update(replace(experience(before, 0.0), reference_logprobs=reference))
    after = rank.logprobs(batch())
    assert float((after - reference)[mask].square().mean()) < 0.9 * float((before - reference)[mask].square().mean())


# ---------------------------------------------------------------------------------------------- without a critic


@pytest.mark.ray
def test_in_a_critics_place_there_is_no_process_and_every_answer_is_empty(ray_cluster: None, tmp_path: Path) -> None:
    critic = NoCritic(Cluster(PlacementConfig(), {}))
    values = critic.values(batch()).result()
    assert values.shape == (len(LENGTHS), max(LENGTHS) + 1) and not values.any()
    critic.ready()
    critic.reset_usage()
    assert critic.update(experience(torch.zeros(len(LENGTHS), max(LENGTHS)), 0.0)).result() == critic.usage_metrics(1.0) == {}
    assert critic.hosts == critic.save(tmp_path).result() == critic.load(tmp_path).result() == list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ however it is cut


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 30}, {"activation_checkpointing": True}, {"zero_stage": 0}])
def test_micro_batches_and_memory_settings_do_not_change_the_update(nano: Path, one_rank: dict[str, object], changes: dict[str, object]) -> None:
    assert_same_update(one_rank, course(nano, Rank(0, 1, "cpu"), **changes))


def assert_same_update(expected: dict[str, object], found: dict[str, object]) -> None:
    for role in ("policy", "critic"):
        assert found[role] == pytest.approx(expected[role], rel=1e-4, abs=1e-6)
        assert difference(found[f"{role}_weights"], expected[f"{role}_weights"]) < 1e-5
        largest = max(float(tensor.abs().max()) for tensor in expected[f"{role}_gradient"].values())
        assert difference(found[f"{role}_gradient"], expected[f"{role}_gradient"]) < 1e-4 * largest and largest > 1e-2


@pytest.mark.slow
def test_two_ranks_update_as_one(one_rank: dict[str, object], two_ranks: list[dict[str, object]]) -> None:
    """Losses, gradients, their norms, weights and the early stop, though the last mini-batch leaves one of the ranks without a row."""
    assert one_rank["policy"]["policy/early_stopped"] == 1  # type: ignore[index]
    for found in two_ranks:
        assert_same_update(one_rank, found)


@pytest.mark.slow
def test_shares_of_two_ranks_joined_are_the_whole_batch(one_rank: dict[str, object], two_ranks: list[dict[str, object]]) -> None:
    for name in ("logprobs", "values"):
        assert torch.allclose(torch.cat([found[name] for found in two_ranks]), one_rank[name], atol=1e-5)


# ------------------------------------------------------------------------------------------------ not finite


def spoilt(logprobs: Tensor) -> Experience:
    """One advantage is nan: every mini-batch of nine rows has it."""
    advantages = varied()
    advantages[0, PROMPT] = math.nan
    return experience(logprobs, advantages)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_loss_that_is_not_finite_stops_and_changes_nothing(nano: Path, zero_stage: int) -> None:
    rank = policy_rank(nano, algorithm=AlgorithmConfig(mini_batch_size=len(LENGTHS)), zero_stage=zero_stage)
    before, logprobs = weights_of(rank), rank.logprobs(batch())
    saved = nano / "refused" / "step-000000.safetensors"
    with pytest.raises(FloatingPointError, match=f"step 0, PPO epoch 0: a loss or gradient is not finite and no update was applied; .* in {saved};"):
        rank.update(spoilt(logprobs))
    assert difference(weights_of(rank), before) == 0


def test_the_mini_batch_of_a_refused_update_is_saved_with_what_made_it_so(nano: Path, tmp_path: Path) -> None:
    """The first of a step; of several steps the newest three."""
    rank = policy_rank(nano, algorithm=AlgorithmConfig(mini_batch_size=3, ppo_epochs=2, non_finite="skip"))
    rank.learner = replace(rank.learner, refused=tmp_path / "refused")
    taken = spoilt(rank.logprobs(batch()))
    for step in range(5):
        rank.update(replace(taken, step=step))
    assert sorted(path.name for path in rank.learner.refused.iterdir()) == [f"step-00000{step}.safetensors" for step in (2, 3, 4)]
    saved = load_file(rank.learner.refused / "step-000004.safetensors")
    rows = taken.rows(saved.pop("rows"))
    assert (
        set(saved) == {"token_ids", "lengths", "response_mask", "logprobs", "reference_logprobs", "values", "advantages", "returns"}
        and len(saved["lengths"]) == 3
    )
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, getattr(rows, name), equal_nan=True)
    assert saved["advantages"].isnan().sum() == 1


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_when_told_to_skip_it_counts_and_goes_on(nano: Path, zero_stage: int) -> None:
    algorithm = AlgorithmConfig(mini_batch_size=len(LENGTHS), ppo_epochs=2, non_finite="skip")
    rank = policy_rank(nano, algorithm=algorithm, zero_stage=zero_stage)
    before, logprobs = weights_of(rank), rank.logprobs(batch())
    metrics = rank.update(spoilt(logprobs))
    assert metrics["policy/skipped_updates"] == 2
    assert math.isnan(metrics["train/actor_loss"])  # there is nothing to report
    assert difference(weights_of(rank), before) == 0
    assert rank.update(experience(logprobs, varied()))["policy/skipped_updates"] == 0
    assert 0 < difference(weights_of(rank), before) < math.inf


def test_a_skipped_mini_batch_leaves_the_means_of_the_others(nano: Path) -> None:
    algorithm = AlgorithmConfig(mini_batch_size=3, non_finite="skip")
    rank = critic_rank(nano, algorithm=algorithm)
    taken = experience(torch.zeros(len(LENGTHS), max(LENGTHS)), 0.0)
    returns = taken.returns.clone()
    returns[0, PROMPT] = math.inf
    metrics = rank.update(replace(taken, returns=returns))
    assert metrics["critic/skipped_updates"] == 1
    assert math.isfinite(metrics["train/critic_loss"]) and math.isfinite(metrics["train/critic_grad_norm"])


# ------------------------------------------------------------------------------------------------ saved, exported


def test_a_rank_that_cannot_write_names_the_directory(nano: Path, tmp_path: Path) -> None:
    """No file may grow beyond a KiB, as on a disk that is full; torch's own error has no path."""
    rank = policy_rank(nano)
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match=f"while writing the checkpoint {tmp_path}/policy; earlier checkpoints are untouched"):
            rank.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_export_that_finds_no_room_leaves_the_model_that_was_there(nano: Path, tmp_path: Path) -> None:
    rank = policy_rank(nano)
    rank.export(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ExportError, match=f"while writing the model {tmp_path}/model; make room, and go on with checkpoint.resume=auto"):
            rank.export(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_saved_policy_goes_on_as_if_it_had_not_stopped(nano: Path, tmp_path: Path) -> None:
    first = policy_rank(nano)
    taken = experience(first.logprobs(batch()), varied())
    first.update(taken)
    first.save(tmp_path)
    second = policy_rank(nano)
    second.load(tmp_path)
    assert torch.equal(second.logprobs(batch()), first.logprobs(batch()))
    assert second.update(replace(taken, step=1)) == first.update(replace(taken, step=1))
    assert difference(weights_of(second), weights_of(first)) == 0


@pytest.mark.parametrize("preset", ["nano", "llama"])
def test_an_export_after_an_update_loads_with_transformers_and_says_the_same(preset: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rank = policy_rank(request.getfixturevalue(preset))
    before = rank.logprobs(batch())
    rank.update(experience(before, varied()))
    rank.export(tmp_path)
    loaded = TokenLogprobs(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    logprobs, _ = loaded(batch().token_ids, batch().response_mask)
    assert torch.allclose(logprobs, rank.logprobs(batch()), atol=1e-6)
    assert not torch.allclose(logprobs, before, atol=1e-2)
