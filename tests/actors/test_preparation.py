"""What a PPO job refuses before any process starts, and where it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.parent import RESTARTS
from actors.preparation import Preparation, refuse_differences
from actors.weights import PROBE_LENGTH
from minigpt_ray.checkpoint import Checkpoints
from minigpt_ray.cli import read_config, resolved, write_resolved
from minigpt_ray.config import PPOConfig
from minigpt_ray.data.rows import DataError
from minigpt_ray.status import InUse
from minigpt_ray.tokenizer import train_tokenizer
from tests.test_status import driver

QUESTIONS = [{"prompt": f"what is {n}?", "answer": str(n)} for n in range(6)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(nano: Path, tmp_path: Path) -> Path:
    """A run that has been through prepare_data and SFT."""
    shutil.copytree(nano, tmp_path / "debug" / "sft" / "model")
    write_rows(tmp_path / "debug" / "prepare_data" / "prompts.jsonl", QUESTIONS)
    write_rows(tmp_path / "debug" / "prepare_data" / "held_out.jsonl", QUESTIONS[:4])
    return tmp_path / "debug"


@pytest.fixture
def config(run: Path) -> Callable[..., PPOConfig]:
    """The run's configuration, given overrides of the command line."""
    return lambda *overrides: read_config(PPOConfig, [f"output_dir={run.parent}", "evaluation.num_prompts=3", *overrides])


def test_a_finished_stage_and_its_data_are_found(config: Callable[..., PPOConfig], run: Path) -> None:
    ready = Preparation(config("sampling.max_tokens=10", "evaluation.sampling.max_tokens=20"))
    assert ready.policy_path == str(run / "sft" / "model")
    assert (len(ready.prompts), len(ready.held_out)) == (6, 3)
    assert ready.max_model_len == max(len(p.token_ids) for p in ready.prompts.prompts) + 20
    assert ready.start is None
    assert list(ready.roles) == ["generator", "policy", "critic", "reference", "rewards"]
    assert ready.shapes.policy == ready.shapes.critic == ready.shapes.reference and ready.shapes.vocab_size == 260


def test_the_generator_has_room_for_the_probe_however_short_the_texts(config: Callable[..., PPOConfig], run: Path) -> None:
    write_rows(run / "prepare_data" / "prompts.jsonl", [{"prompt": "?", "answer": "1"}])
    write_rows(run / "prepare_data" / "held_out.jsonl", [{"prompt": "!", "answer": "1"}])
    ready = Preparation(config("sampling.max_tokens=1", "evaluation.sampling.max_tokens=1"))
    assert ready.max_model_len == PROBE_LENGTH + 1


def test_nothing_is_written_before_the_tracker_opens(config: Callable[..., PPOConfig], run: Path) -> None:
    ready = Preparation(config())
    assert not (run / "ppo").exists()
    with ready.tracker():
        assert (run / "ppo" / "config.yaml").is_file()


def test_a_restart_of_the_driver_is_a_mark_of_the_timeline(config: Callable[..., PPOConfig], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = run / "ppo" / "timeline.json"
    with Preparation(config()).tracker():
        assert not timeline.exists()
    monkeypatch.setenv(RESTARTS, "1")
    with Preparation(config("checkpoint.resume=auto")).tracker():
        assert [event["name"] for event in json.loads(timeline.read_text())] == ["process_name", "driver restarted"]


def test_a_stage_that_has_not_run_is_named(config: Callable[..., PPOConfig], run: Path) -> None:
    shutil.rmtree(run / "sft")
    with pytest.raises(FileNotFoundError, match=r"init_from='sft' is neither a finished stage of this run \(.*/sft/model has no config.json\)"):
        Preparation(config())


def test_missing_data_is_named_with_the_way_out(config: Callable[..., PPOConfig], run: Path) -> None:
    (run / "prepare_data" / "held_out.jsonl").unlink()
    with pytest.raises(DataError, match=r"held_out.jsonl: no such file, .*run python -m jobs.prepare_data first"):
        Preparation(config())


def test_prompts_without_answers_cannot_be_verified(config: Callable[..., PPOConfig], run: Path) -> None:
    bare, answered = run / "bare.jsonl", run / "prepare_data" / "prompts.jsonl"
    write_rows(bare, [{"prompt": "who knows?"}])
    files = f"data.files=[{answered}, {bare}]"
    with pytest.raises(
        ValueError, match=r"rewards\.verifier verifies answers, but 1 of 7 prompts carry none; give every prompt an answer or use another reward"
    ):
        Preparation(config(files))
    assert len(Preparation(config(files, "rewards={any: {kind: function, function: 'math:fsum'}}")).prompts) == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.mine={kind: function, function: 'math:no_such'}", r"rewards\.mine\.function=math:no_such"),
        (
            "rewards.mine={kind: http, url: 'http://127.0.0.1:9/score'}",
            r"rewards\.mine: .*could not be reached .*; start the server, or correct rewards\.mine\.url",
        ),
        ("rewards.mine={kind: model, init_from: reward_model}", "init_from='reward_model' is neither a finished stage"),
        ("policy.init_from=./nowhere", r"init_from='\./nowhere' is neither a finished stage"),
        ("data.max_prompt_tokens=3", "all 6 prompts are longer than max_prompt_tokens=3"),
    ],
)
def test_what_is_not_there_is_refused(config: Callable[..., PPOConfig], override: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Preparation(config(override))


@pytest.mark.parametrize(
    ("field", "other"), [("sampling.max_tokens", "evaluation.sampling.max_tokens"), ("evaluation.sampling.max_tokens", "sampling.max_tokens")]
)
def test_texts_that_the_models_cannot_read_are_refused_with_the_settings(config: Callable[..., PPOConfig], run: Path, field: str, other: str) -> None:
    write_rows(run / "prepare_data" / "held_out.jsonl", [{"prompt": "what is 1000?", "answer": "1000"}])
    prompt = Preparation(config(f"{field}=100", f"{other}=8")).max_model_len - 100
    assert Preparation(config(f"{field}={512 - prompt}", f"{other}=8")).max_model_len == 512
    with pytest.raises(ValueError) as refusal:
        Preparation(config(f"{field}={513 - prompt}", f"{other}=8"))
    assert str(refusal.value) == (
        f"policy: the model {run}/sft/model reads 512 tokens, but the longest prompt has {prompt} and {field}={513 - prompt} come after it; "
        f"lower {field}, or evaluation.data.max_prompt_tokens, by which longer prompts are dropped or cut, or take a model that reads more"
    )


def test_every_role_has_to_read_prompts_and_responses(config: Callable[..., PPOConfig], run: Path) -> None:
    short = shutil.copytree(run / "sft" / "model", run / "short")
    said = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(said | {"max_position_embeddings": 40}))
    for role in ("critic", "reference"):
        with pytest.raises(ValueError, match=rf"^{role}: the model {short} reads 40 tokens"):
            Preparation(config(f"{role}.init_from={short}"))
    with pytest.raises(ValueError, match=rf"^rewards\.rm: the model {short} reads 40 tokens"):
        Preparation(config(f"rewards.rm={{kind: model, init_from: {short}}}"))


def test_a_reward_model_with_another_vocabulary_than_the_policy_is_refused(config: Callable[..., PPOConfig], run: Path) -> None:
    other = shutil.copytree(run / "sft" / "model", run / "other")
    train_tokenizer(["hello hello"] * 9, 262).save_pretrained(other)
    with pytest.raises(ValueError, match=rf"^rewards\.rm: the reward model {other} has another vocabulary than the policy, .* kind: http$"):
        Preparation(config(f"rewards.rm={{kind: model, init_from: {other}}}"))


# --------------------------------------------------------------------------------------------------- going on


def checkpoint(run: Path, config: PPOConfig, step: int) -> Path:
    checkpoints = Checkpoints(run / "ppo" / "checkpoint", keep=2)
    directory = checkpoints.begin(step)
    write_resolved(config, directory)
    return checkpoints.commit(step)


def test_auto_goes_on_from_the_newest_checkpoint(config: Callable[..., PPOConfig], run: Path) -> None:
    checkpoint(run, config(), 2)
    newest = checkpoint(run, config(), 4)
    assert Preparation(config("checkpoint.resume=auto")).start == newest


@pytest.mark.parametrize("left", ["checkpoint", "model", "metrics.jsonl"])
def test_never_does_not_write_over_an_earlier_run(config: Callable[..., PPOConfig], run: Path, left: str) -> None:
    (run / "ppo" / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"ppo/{left} is there from an earlier run, .* with checkpoint.resume=auto, choose another run=, or remove .*/ppo"):
        Preparation(config())
    assert Preparation(config("checkpoint.resume=auto")).start is None  # nothing to go on from


@pytest.mark.parametrize(
    "override",
    [
        *("steps=900", "logging.every=5", "checkpoint.keep=7", "generator.restart_limit=9", "placement.generator.workers=2", "rewards.verifier.retries=7"),
        *("weights.probe_tolerance=0.5", "restart_limit=9", "score_chunk=7", "algorithm.non_finite=skip"),
        *("policy.micro_batch_tokens=99", "critic.activation_checkpointing=true", "reference.micro_batch_tokens=99"),
    ],
)
def test_a_resumed_run_may_change_what_does_not_make_it_another(config: Callable[..., PPOConfig], run: Path, override: str) -> None:
    start = checkpoint(run, config(), 2)
    assert Preparation(config("checkpoint.resume=auto", override)).start == start


def test_a_resumed_run_that_would_be_another_is_refused_with_every_field(config: Callable[..., PPOConfig], run: Path) -> None:
    start = checkpoint(run, config(), 2)
    with pytest.raises(ValueError) as refusal:
        Preparation(config("checkpoint.resume=auto", "seed=7", "policy.optimizer.lr=1e-3", "steps=900", "algorithm.non_finite=skip", "algorithm.ppo_epochs=2"))
    assert str(refusal.value) == (
        f"cannot resume from {start}, the configuration has changed (algorithm.ppo_epochs: 1 -> 2, policy.optimizer.lr: 1e-06 -> 0.001, seed: 0 -> 7); undo that, or choose another run="
    )
    assert start.is_dir()
    with pytest.raises(ValueError, match=r"changed \(placement\.critic\.ranks: 1 -> 2\)"):  # a checkpoint has a file for every rank
        Preparation(config("checkpoint.resume=auto", "placement.critic.ranks=2"))


def test_two_drivers_do_not_write_one_run(config: Callable[..., PPOConfig], run: Path) -> None:
    ready = Preparation(config("checkpoint.resume=auto"))
    (run / "ppo").mkdir()
    with driver(run / "ppo") as other:  # it begins after we have looked
        for prepare in (ready.tracker, lambda: Preparation(config("checkpoint.resume=auto"))):
            with pytest.raises(InUse, match=f"{run}/ppo is written by process {other.pid}"):
                prepare()
    assert [path.name for path in (run / "ppo").iterdir()] == ["status.json"]
    with Preparation(config("checkpoint.resume=auto")).tracker():
        assert (run / "ppo" / "metrics.jsonl").exists()


def test_fields_that_came_or_went_are_differences(config: Callable[..., PPOConfig]) -> None:
    before = resolved(config())
    after = resolved(config("rewards.more={kind: function, function: 'math:fsum'}"))
    refuse_differences(before, before, Path("there"))
    for old, new, change in ((before, after, "None -> function"), (after, before, "function -> None")):
        with pytest.raises(ValueError, match=rf"rewards\.more\.kind: {change}"):
            refuse_differences(old, new, Path("there"))


@pytest.fixture
def begun(config: Callable[..., PPOConfig], run: Path, nano: Path) -> tuple[Callable[..., PPOConfig], Path]:
    """A run with a checkpoint, a critic and a reward model of its own, and a configuration to go on with."""
    for stage in ("critic", "rm"):
        shutil.copytree(nano, run / stage / "model")
    (run / "rm" / "model" / "validation.json").write_text(json.dumps({"validation/reward_mean": 0.0, "validation/reward_std": 1.0}))
    overrides = ("critic.init_from=critic", "rewards.rm={kind: model, init_from: rm, normalize: true}")
    with Preparation(config(*overrides)).tracker():
        pass
    return lambda *more: config(*overrides, "checkpoint.resume=auto", *more), checkpoint(run, config(*overrides), 2)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ("sft/model/model.safetensors", "policy.init_from: {run}/sft/model"),
        ("critic/model/config.json", "critic.init_from: {run}/critic/model"),
        ("rm/model/validation.json", "rewards.rm.init_from: {run}/rm/model"),
        ("prepare_data/prompts.jsonl", "data file 1: {run}/prepare_data/prompts.jsonl"),
    ],
)
def test_a_resumed_run_that_began_from_something_else_is_refused(begun: tuple[Callable[..., PPOConfig], Path], run: Path, changed: str, name: str) -> None:
    config, start = begun
    assert Preparation(config()).start == start
    content = (run / changed).read_bytes()
    (run / changed).write_bytes(content.replace(b"1", b"2") if changed.endswith((".json", ".jsonl")) else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError) as refusal:
        Preparation(config())
    assert str(refusal.value) == (
        f"cannot resume from {start}, what it began from has changed since ({name.format(run=run)}); "
        f"undo that, choose another run=, or remove {run}/ppo to begin again from what is there now"
    )
    (run / changed).write_bytes(content)
    assert Preparation(config()).start == start
    (run / "ppo" / "inputs.json").unlink()  # as in a run of before
    (run / "prepare_data" / "prompts.jsonl").write_text(json.dumps(QUESTIONS[0]))
    with Preparation(config()).tracker():
        assert not (run / "ppo" / "inputs.json").exists()


def test_a_run_that_has_no_checkpoint_begins_from_what_is_there_now(begun: tuple[Callable[..., PPOConfig], Path], run: Path) -> None:
    config, start = begun
    shutil.rmtree(start)
    write_rows(run / "prepare_data" / "prompts.jsonl", QUESTIONS[:5])
    with Preparation(config()).tracker():
        start = checkpoint(run, config(), 1)
    assert Preparation(config()).start == start
