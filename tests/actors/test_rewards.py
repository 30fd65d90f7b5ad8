"""Rewards of whole responses: by rule, by a function, by a model; weighted, and failed where a source gave none."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.attempts import Scored
from actors.placement import Cluster, roles_of
from actors.rank_host import Rank
from actors.reward_functions import RewardFunctions
from actors.reward_model import RewardModelRank
from actors.reward_process import FunctionProcess
from actors.reward_sources import check_sources
from actors.rewards import RewardError, Rewards
from minigpt_ray.config import FunctionReward, ModelReward, PlacementConfig, VerifierReward
from minigpt_ray.models import export, load_scalar
from minigpt_ray.rl.experience import Prompt, RewardScores, Rollout, RolloutBatch
from minigpt_ray.tokenizer import load_tokenizer, train_tokenizer

RANK = Rank(0, 1, "cpu")
SPELLING = {"question": "Spell this word backward (example: sun -> nus): cat", "answer": "tac", "metadata": {"source_dataset": "spell_backward"}}


def rollout(text: str, answer: dict | None, serial: int = 0, tokens: tuple[int, ...] = (5, 6), valid: bool = True) -> Rollout:
    prompt = Prompt(serial, ({"role": "user", "content": "?"},), np.array([1, 2, 3], np.int32), "source", answer)
    size = len(tokens)
    zeros = np.zeros(size, np.float32)
    return Rollout(prompt, 0, np.array(tokens, np.int32), np.ones(size, bool), zeros, zeros.astype(np.int32), text, "stop", valid)


ROLLOUTS = [rollout("tac", SPELLING), rollout("tap", SPELLING), rollout("", SPELLING), rollout(" 7 ", {"answer": "7"}), rollout("7", None)]
UNKNOWN_TASK = rollout("x", {"question": "?", "answer": "x", "metadata": {"source_dataset": "no_such_task"}})

FUNCTIONS = """
import functools, pathlib, time

def lengths(rollouts):
    return [len(r.text) for r in rollouts]

def too_few(rollouts):
    return [0.0] * (len(rollouts) - 1)

def picky(rollouts):
    return [len(r.text) / bool(r.text) for r in rollouts]

def blind(rollouts):
    return [1.0 if r.text else float("nan") for r in rollouts]

def wait_for(theirs, mine, rollouts):
    pathlib.Path(__file__).with_name(mine).touch()
    while not pathlib.Path(__file__).with_name(theirs).exists():
        time.sleep(0.01)
    return [1.0] * len(rollouts)

def silent(rollouts):
    time.sleep(60)

first, second = functools.partial(wait_for, "second", "first"), functools.partial(wait_for, "first", "second")
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module; its name."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards"


@contextmanager
def built(**sources: VerifierReward | FunctionReward) -> Iterator[RewardFunctions]:
    ranks = RewardFunctions(RANK, sources, {})
    yield ranks
    for source_of_rank in ranks.sources.values():
        if isinstance(source_of_rank.call, FunctionProcess):
            source_of_rank.call.close()


def scored_by(name: str, source: VerifierReward | FunctionReward) -> Scored:
    with built(**{name: source}) as ranks:
        return ranks.score(ROLLOUTS)[name]


def scores(name: str, source: VerifierReward | FunctionReward) -> list[float]:
    return scored_by(name, source).scores


def test_the_verifier_gives_partial_credit_and_nothing_where_there_is_no_answer() -> None:
    right, almost, empty, exact, unknown = scores("verifier", VerifierReward())
    assert right == exact == 1.0
    assert 0 < almost < 1 and empty == 0.0
    assert math.isnan(unknown)


def test_exact_only_counts_full_scores() -> None:
    found = scores("verifier", VerifierReward(exact_only=True))
    assert found[:4] == [1.0, 0.0, 0.0, 1.0] and math.isnan(found[4])


def test_verify_is_the_rule_whatever_the_reward_is(functions: str) -> None:
    with built(lengths=FunctionReward(function=f"{functions}:lengths")) as ranks:
        np.testing.assert_equal(ranks.verify(ROLLOUTS)["evaluation"].scores, scores("verifier", VerifierReward()))


def test_a_function_of_the_user_is_called_with_the_rollouts(functions: str) -> None:
    assert scores("lengths", FunctionReward(function=f"{functions}:lengths")) == [3.0, 3.0, 0.0, 3.0, 1.0]


def test_all_sources_are_asked_at_once(functions: str) -> None:
    """Each of two functions answers when the other has been called; one after the other they would run out of time."""
    sources = {name: FunctionReward(function=f"{functions}:{name}", timeout_s=20, retries=0) for name in ("first", "second")}
    with built(**sources) as ranks:
        assert [scored.scores for scored in ranks.score(ROLLOUTS).values()] == [[1.0] * 5, [1.0] * 5]


def test_a_function_that_gives_too_few_scores_stops_the_run(functions: str) -> None:
    found = scored_by("mine", FunctionReward(function=f"{functions}:too_few", retries=1, max_errors=0))
    assert found.too_many == (
        "rewards.mine: 1 of the newest 1 rollouts stay without a score, where max_errors=0 of 100 may; the last failure: it gave 0 scores for 1 rollouts; "
        "it must give one for each, in order; mend my_rewards:too_few, or raise rewards.mine.max_errors"
    )
    assert found.calls == {"errors": 3, "timeouts": 0, "lost": 0, "retries": 2}


def test_one_rollout_that_makes_a_function_raise_is_the_only_one_without_a_score(functions: str) -> None:
    found = scored_by("mine", FunctionReward(function=f"{functions}:picky", retries=1))
    assert found.too_many == ""
    np.testing.assert_equal(found.scores, [3.0, 3.0, math.nan, 3.0, 1.0])
    assert found.calls == {"errors": 3, "timeouts": 0, "lost": 0, "retries": 1 + 5}


def test_a_verifier_that_raises_leaves_that_rollout_without_a_score() -> None:
    source = RewardFunctions(RANK, {"verifier": VerifierReward(retries=1)}, {}).sources["verifier"]
    found = source.score([*ROLLOUTS[:4] * 3, UNKNOWN_TASK])
    assert math.isnan(found.scores[-1]) and not any(map(math.isnan, found.scores[:-1])) and found.too_many == ""
    assert found.calls["errors"] == 2


@pytest.mark.parametrize(
    ("function", "reason"), [("my_rewards:missing", "has no attribute 'missing'"), ("no_such_module:f", "No module named 'no_such_module'")]
)
def test_an_unknown_function_is_refused_by_name(functions: str, function: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"rewards\.mine\.function={function}: .*{reason}.*; name it as module:function, importable from where the job starts"
    ):
        RewardFunctions(RANK, {"mine": FunctionReward(function=function)}, {})


# ------------------------------------------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def reward_model(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence-classification checkpoint with the policy's vocabulary."""
    path = tmp_path_factory.mktemp("reward_model")
    export(load_scalar(str(nano), "float32", seed=5), load_tokenizer(nano), path)
    return path


RESPONSES = [rollout("", None, tokens=tokens) for tokens in [(9,), (4, 5, 6, 7, 8), (50, 60, 70), (1, 2)]]


@pytest.mark.parametrize("budget", [1, 9, 16384])
def test_a_reward_model_scores_the_last_token(nano: Path, reward_model: Path, budget: int) -> None:
    rank = RewardModelRank(RANK, "rewards.model", str(reward_model), str(nano), ModelReward(init_from="x", micro_batch_tokens=budget))
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    with torch.no_grad():
        expected = [model(torch.tensor([[1, 2, 3, *r.token_ids.tolist()]])).logits.item() for r in RESPONSES]
    assert len({round(score, 4) for score in expected}) == 4
    assert rank.scores(RolloutBatch.of(RESPONSES)).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_normalised_reward_is_in_units_of_the_spread_on_held_out_answers(nano: Path, reward_model: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_model, tmp_path, dirs_exist_ok=True)
    config = ModelReward(init_from=str(tmp_path), normalize=True)
    with pytest.raises(ValueError, match=r"rewards\.rm: normalize=true, but .*validation\.json holds no spread of held-out rewards; train with"):
        check_sources({"rm": config}, tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps({"validation/reward_mean": 2.0, "validation/reward_std": 4.0}))
    check_sources({"rm": config}, tmp_path)
    plain, normalised = (
        RewardModelRank(RANK, "rewards.rm", str(tmp_path), str(nano), c).scores(RolloutBatch.of(RESPONSES)) for c in (ModelReward(init_from="x"), config)
    )
    torch.testing.assert_close(normalised, (plain - 2) / 4)


def test_two_replicas_score_their_shares(nano: Path, reward_model: Path) -> None:
    def scored(rank: Rank) -> torch.Tensor:
        return RewardModelRank(rank, "rewards.model", str(reward_model), str(nano), ModelReward(init_from="x")).scores(RolloutBatch.of(RESPONSES[:3]))

    assert torch.allclose(torch.cat([scored(Rank(0, 2, "cpu")), scored(Rank(1, 2, "cpu"))]), scored(RANK), atol=1e-6)


def test_a_reward_model_with_another_vocabulary_is_refused(nano: Path, reward_model: Path, tmp_path: Path) -> None:
    export(load_scalar(str(nano), "float32", seed=5), train_tokenizer(["hello hello"] * 9, 262), tmp_path)
    with pytest.raises(RewardError, match=r"rewards\.model: the reward model .* has another vocabulary than the policy"):
        RewardModelRank(RANK, "rewards.model", str(tmp_path), str(nano), ModelReward(init_from="x"))


# -------------------------------------------------------------------------------------- all sources, weighted


@pytest.fixture(scope="module")
def counted(ray_cluster: None, nano: Path, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardScores, dict[str, float]]:
    """SCORED by a verifier, two functions of a user and a reward model, each in processes of their own; and what was counted."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "rewards_of_a_user.py").write_text(FUNCTIONS)
    sources = {
        "verifier": VerifierReward(weight=2.0),
        "lengths": FunctionReward(function="rewards_of_a_user:lengths", weight=-0.5),
        "blind": FunctionReward(function="rewards_of_a_user:blind"),
        "model": ModelReward(init_from=str(reward_model), weight=3.0),
    }
    roles = {name: role for name, role in roles_of(PlacementConfig(), sources).items() if name.startswith("reward")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(directory))
        with Cluster(PlacementConfig(), roles) as cluster:
            rewards = Rewards(cluster, sources, directory, str(nano))
            scores = rewards.score(SCORED, RolloutBatch.of(SCORED)).result()
            return scores, rewards.metrics()


@pytest.fixture(scope="module")
def scored(counted: tuple[RewardScores, dict[str, float]]) -> RewardScores:
    return counted[0]


SCORED = [*ROLLOUTS[:4], replace(ROLLOUTS[0], valid=False), ROLLOUTS[4]]


@pytest.mark.ray
def test_the_reward_is_the_weighted_sum_of_all_sources(scored: RewardScores) -> None:
    verifier, lengths, blind, model = scored.by_source.values()
    assert list(scored.by_source) == ["verifier", "lengths", "blind", "model"]
    assert lengths[:4].tolist() == [3, 3, 0, 3] and verifier[0] == 1
    expected = 2 * verifier - 0.5 * lengths + blind + 3 * model
    assert torch.allclose(scored.total[~scored.failed], expected[~scored.failed])


@pytest.mark.ray
def test_a_rollout_fails_where_a_source_has_no_score_or_the_sample_was_dropped(scored: RewardScores) -> None:
    """The blind function sees nothing in the empty text, the last prompt has no answer to verify."""
    assert scored.failed.tolist() == [False, False, True, False, True, True]
    assert not scored.total[scored.failed].any()


@pytest.mark.ray
def test_what_a_source_could_not_score_is_counted_by_source(counted: tuple[RewardScores, dict[str, float]]) -> None:
    """Dropped samples are nobody's failure."""
    counts = counted[1]
    assert {name: counts[f"reward_calls/{name}/unscored"] for name in ("verifier", "lengths", "blind", "model")} == dict(
        verifier=1, lengths=0, blind=1, model=0
    )
    others = {name: count for name, count in counts.items() if not name.endswith("/unscored")}
    assert len(others) == 4 * 4 and set(others.values()) == {0.0}  # three sources that are called, and the verifier of evaluations


@pytest.mark.ray
def test_too_many_failures_reach_the_driver_as_one_sentence_and_are_counted_before(ray_cluster: None, tmp_path: Path) -> None:
    sources = {"strict": VerifierReward(retries=1, max_errors=0)}
    roles = {name: role for name, role in roles_of(PlacementConfig(), sources).items() if name.startswith("reward")}
    with Cluster(PlacementConfig(), roles) as cluster:
        rewards = Rewards(cluster, sources, tmp_path, "")
        rollouts = [*ROLLOUTS[:4], UNKNOWN_TASK]
        with pytest.raises(
            RewardError, match=r"^rewards\.strict: 1 of the newest 5 rollouts stay without a score, where max_errors=0 of 100 may; .*no_such_task"
        ):
            rewards.score(rollouts, RolloutBatch.of(rollouts)).result()
        assert rewards.metrics()["reward_calls/strict/errors"] == 2
        failing = [UNKNOWN_TASK] * 20
        with pytest.raises(RewardError, match=r"^the verifier of evaluations: 11 of the newest 11 .* remove such prompts from the held-out set$"):
            rewards.verify(failing).result()


@pytest.mark.ray
def test_a_source_may_take_all_its_attempts_before_its_process_counts_as_hung(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that never answers: twice for both rollouts, then once for each, four seconds in all where a call may take one."""
    (tmp_path / "rewards_that_wait.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sources = {"silent": FunctionReward(function="rewards_that_wait:silent", timeout_s=1, retries=1)}
    placement = PlacementConfig(hang_after_s=1)
    with Cluster(placement, {"rewards": roles_of(placement, sources)["rewards"]}) as cluster:
        rewards = Rewards(cluster, sources, tmp_path, "", restarts=1)
        rewards.functions.ready()
        rollouts = ROLLOUTS[:2]
        assert rewards.score(rollouts, RolloutBatch.of(rollouts)).result().failed.tolist() == [True, True]
        assert rewards.functions.restarts == 0
        assert rewards.metrics()["reward_calls/silent/timeouts"] == 4
