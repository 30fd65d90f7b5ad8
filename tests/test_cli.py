"""The command line: merging, overrides, errors as sentences, help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minigpt_ray.cli import ConfigError, given, load_config, read_config, resolved, to_yaml, write_resolved
from minigpt_ray.config import DPOConfig, MidtrainConfig, PPOConfig, PrepareConfig, PretrainConfig, RewardModelConfig, ServeRewardConfig, SFTConfig

ROOTS = (PPOConfig, PretrainConfig, MidtrainConfig, SFTConfig, DPOConfig, RewardModelConfig, PrepareConfig, ServeRewardConfig)


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_files_merge_left_to_right_and_overrides_come_last(file):
    first = file("steps: 3\npolicy: {optimizer: {lr: 1e-6, warmup_steps: 7}}")
    second = file("steps: 4\npolicy: {optimizer: {lr: 2e-6}}", "b.yaml")
    config = read_config(PPOConfig, ["policy.zero_stage=2", first, second, "steps=5"])
    assert (config.steps, config.policy.zero_stage) == (5, 2)
    assert (config.policy.optimizer.lr, config.policy.optimizer.warmup_steps) == (2e-6, 7)


def test_what_a_command_line_gives_is_known_before_its_root_is(file):
    assert given([file("a: {b: 1}"), "c.d={e: {f: 2}}"]) == {("a",), ("a", "b"), ("c", "d"), ("c", "d", "e"), ("c", "d", "e", "f")}


def test_a_section_given_in_part_keeps_the_rest_of_the_fields_own_default(file):
    assert read_config(SFTConfig, ["optimizer.lr=2e-3"]).optimizer.schedule == "cosine"
    assert read_config(PPOConfig, [file("policy: {optimizer: {schedule: cosine}}")]).policy.optimizer.lr == 1e-6
    assert read_config(PPOConfig, ["critic.zero_stage=2"]).critic.optimizer.lr == 1e-5


def test_named_things_in_a_file_replace_the_default_ones_and_an_override_edits_one(file):
    replaced = file("rewards: {short: {kind: function, function: 'lengths:short'}}")
    assert list(read_config(PPOConfig, [replaced]).rewards) == ["short"]
    edited = read_config(PPOConfig, ["rewards.verifier.weight=2", "rewards.short={kind: function, function: 'a:b'}"]).rewards
    assert list(edited) == ["verifier", "short"] and edited["verifier"].weight == 2
    removed = read_config(PPOConfig, ["rewards.short={kind: function, function: 'a:b'}", "rewards.verifier=null"]).rewards
    assert list(removed) == ["short"]
    whole = read_config(PPOConfig, ["rewards={short: {kind: function, function: 'a:b'}}"]).rewards
    assert list(whole) == ["short"]
    tasks = read_config(PrepareConfig, ["tasks={chain_sum: {options: {min_terms: 2}}}", "tasks.chain_sum.weight=3"]).tasks
    assert list(tasks) == ["chain_sum"] and tasks["chain_sum"].options == {"min_terms": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("+1.5e+3", 1500.0),
        (".5", 0.5),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2025-01-31", "2025-01-31"),
        ("no", "no"),
        ("true", True),
        ("1_000", 1000),
        ("null", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    from minigpt_ray.settings import split

    found = split([f"x={text}"])[1][0].value
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("root", ROOTS)
def test_the_resolved_tree_is_json_and_reads_back_to_an_equal_config(root, tmp_path):
    config = read_config(root, ["run=1e-6x", "output_dir='010'"])
    assert json.loads(json.dumps(resolved(config))) == resolved(config)
    assert read_config(root, [str(write_resolved(config, tmp_path / "new"))]) == config


def test_text_that_looks_like_a_number_survives_the_round_trip(tmp_path):
    config = read_config(PPOConfig, ["run='010'", "sampling.stop=['1e-6', 'no', '', \"\\n\", '# a']"])
    assert yaml.safe_load(to_yaml(config)) == resolved(config)
    assert read_config(PPOConfig, [str(write_resolved(config, tmp_path))]) == config
    assert config.sampling.stop == ("1e-6", "no", "", "\n", "# a")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["stepz=3"], ["stepz: unknown field, did you mean steps?", "override stepz=3"]),
        (["lr=3"], ["did you mean policy.optimizer.lr or critic.optimizer.lr?"]),
        (["policy.lr=3"], ["policy.lr: unknown field, did you mean policy.optimizer.lr"]),
        (["policy=3"], ["policy=3: policy is a section; set its fields, as in policy.zero_stage=...", "override policy=3"]),
        (["policy=null"], ["policy is a section"]),
        (["policy.lora.rank=8"], ["policy: there is no LoRA", "remove lora"]),
        (["steps.x=3"], ["steps: is a single value (an int)", "override steps.x=3"]),
        (["policy.optimizer.lr=abc"], ["policy.optimizer.lr=abc: a float is needed", "override policy.optimizer.lr=abc"]),
        (["generator.backend=foo"], ["generator.backend=foo: one of vllm, transformers is needed"]),
        (["run=123"], ["run=123: a text is needed", "put it in quotes"]),
        (["rewards.verifier.kind=foo"], ["rewards.verifier.kind=foo: unknown; one of verifier, function, model, http"]),
        (["rewards.m.weight=1"], ["rewards.m.kind: is missing; one of verifier, function, model, http is needed", "override rewards.m.weight=1"]),
        (["rewards.m={kind: model}"], ["rewards.m.init_from: is missing"]),
        (["rewards.verifier.wait=1"], ["rewards.verifier.wait: unknown field"]),
        (["algorithm.mini_batch_size=60"], ["use a divisor of 64", "override algorithm.mini_batch_size=60"]),
        (
            ["weights.transport=nccl", "placement.generator.gpus=1", "placement.policy.gpus=1", "placement.hang_after_s=300"],
            ["placement.hang_after_s=300 is no longer than policy and generator workers wait for each other with weights.transport=nccl, 300 s; raise it"],
        ),
        (
            [
                "weights.transport=cuda_ipc",
                "placement.generator.gpus=0.4",
                "generator.gpu_memory_utilization=0.4",
                "placement.colocate=[[critic, policy]]",
                "placement.critic.gpus=1",
            ],
            ["found placement.generator.gpus=0.4 and placement.critic.gpus=1, placement.critic.ranks=1; use object_store or nccl"],
        ),
        (
            [
                "weights.transport=cuda_ipc",
                "placement.generator={gpus: 0.4, labels: {role: generator}}",
                "generator.gpu_memory_utilization=0.4",
                "placement.policy.gpus=0.6",
            ],
            ["cuda_ipc needs generator and policy on one GPU, but placement.generator.labels={'role': 'generator'} and resources={} ask for other nodes"],
        ),
        (
            ["placement.generator.gpus=0.4", "placement.policy.gpus=0.3"],
            ["generator.gpu_memory_utilization=0.85 is more of a GPU than placement.generator.gpus=0.4 leaves it; set it to 0.4 or less, or generator.sleep_"],
        ),
        (["algorithm.estimator=rloo"], ["algorithm.estimator=rloo compares the samples of a prompt, but sampling.n=1; set it to at least 2"]),
        (["algorithm.estimator=reinforce++", "placement.colocate=[[critic, reference]]"], ["placement.colocate names critic", "leave critic out of it"]),
        (["algorithm.estimator=grpo", "algorithm.truncated=bootstrap"], ["algorithm: truncated=bootstrap needs a critic's estimate, but estimator=grpo"]),
        (["algorithm.estimator=rloo", "algorithm.critic_warmup_steps=3"], ["critic_warmup_steps=3 waits for a critic, but estimator=rloo starts none"]),
        (["algorithm.kl_in=loss"], ["kl_in=loss with kl_estimator=k1 has no gradient on average; set kl_estimator=k2 or k3, or kl_in=reward"]),
        (["algorithm.kl_target=0.1", "algorithm.kl_coef=0"], ["kl_target=0.1 adapts kl_coef by a factor, and kl_coef=0 stays 0; start from"]),
        (["algorithm.dual_clip=1"], ["algorithm.dual_clip=1"]),
        (["policy.offload_optimizer=true", "policy.zero_stage=0"], ["policy: offload_optimizer=true needs", "override policy.zero_stage=0"]),
        (["policy.optimizer.betas=[1]"], ["policy.optimizer.betas"]),
        (["--steps=3"], ["--steps=3: unknown option; overrides have no dashes: steps=3"]),
        (["ppo"], ["ppo: neither a YAML file"]),
        (["nope.yaml"], ["nope.yaml: no such file"]),
        (["=3"], ["not a dotted path"]),
        (["steps=%"], ["override steps=%: % is not valid YAML"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_path_and_origin(arguments, parts):
    with pytest.raises(ConfigError) as caught:
        read_config(PPOConfig, arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: 3\nstepz: 4\n", ["stepz: unknown field", "a.yaml, line 2"]),
        ("policy:\n  optimizer:\n    lr: -1\n", ["policy.optimizer.lr=-1", "a.yaml, line 3"]),
        ("policy:\n  zero_stage: 1\n  zero_stage: 2\n", ["a.yaml, line 3: policy.zero_stage is given a second time, first in line 2"]),
        ("policy: [\n", ["a.yaml, line 2: not valid YAML"]),
        ("a\tb: {\n", ["a.yaml, line", "not valid YAML"]),
        ("- 1\n", ["a.yaml: holds [1], but a mapping"]),
        ("3: x\n", ["a.yaml, line 1: the key 3 is not text"]),
        ("prompts_per_step: 8\nalgorithm:\n  mini_batch_size: 5\n", ["prompts_per_step: ", "a.yaml, line 1; algorithm.mini_batch_size: ", "a.yaml, line 3"]),
    ],
)
def test_a_mistake_in_a_file_names_the_line(file, text, parts):
    with pytest.raises(ConfigError) as caught:
        read_config(PPOConfig, [file(text)])
    for part in parts:
        assert part in str(caught.value)


def test_what_a_critic_would_need_is_not_asked_where_there_is_none():
    asked = ["placement.critic.ranks=128", "critic.offload_optimizer=true"]
    with pytest.raises(ConfigError, match=r"placement\.critic\.ranks=128"):
        read_config(PPOConfig, asked)
    assert not read_config(PPOConfig, [*asked, "algorithm.estimator=reinforce++"]).algorithm.uses_critic


def test_an_empty_file_changes_nothing(file):
    assert read_config(PPOConfig, [file("# nothing\n")]) == PPOConfig()


def test_every_mistake_is_told_and_the_process_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(PPOConfig, ["steps=0", "prompts_per_step=x"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and len(err.splitlines()) == 2


@pytest.mark.parametrize("root", ROOTS)
def test_help_lists_every_field(root, capsys):
    from minigpt_ray.schema import field_paths

    with pytest.raises(SystemExit) as caught:
        load_config(root, ["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith(root.__doc__)
    for path in field_paths(root):
        assert ".".join(path) in out


def test_dry_run_prints_what_would_run(capsys, file):
    with pytest.raises(SystemExit) as caught:
        load_config(SFTConfig, ["--dry-run", "steps=7"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == to_yaml(read_config(SFTConfig, ["steps=7"]))


def test_the_command_line_imports_neither_torch_nor_ray():
    code = "import sys; from minigpt_ray.cli import load_config; from minigpt_ray.config import PPOConfig; load_config(PPOConfig, []); print([m for m in ('torch', 'ray', 'vllm', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == "[]"


def test_a_submitted_job_needs_an_absolute_output_dir(file, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    needed = "is relative, but a submitted job runs in a temporary copy of the working directory; use an absolute path that every node sees"
    with pytest.raises(ConfigError, match=f"output_dir: outputs {needed}"):
        read_config(PPOConfig, [])
    given_in = file("output_dir: runs")
    with pytest.raises(ConfigError) as caught:
        read_config(SFTConfig, [given_in])
    assert str(caught.value) == f"output_dir: runs {needed} ({given_in}, line 1)"
    assert read_config(SFTConfig, [given_in, "output_dir=/shared"]).output_dir == Path("/shared")


def test_an_output_dir_that_is_a_url_is_refused():
    with pytest.raises(ConfigError, match="s3:/bucket/runs is a URL, but a run is kept in a file system that every node sees"):
        read_config(PPOConfig, ["output_dir=s3://bucket/runs"])


@pytest.mark.parametrize(
    "url", ["s3://KEY:SECRET@bucket/models", "s3://KEY:SEC/RET@bucket", "abfs://:SECRET@account.dfs.core.windows.net/models", "hdfs://me:SECRET@host:8020/x"]
)
def test_a_url_with_credentials_is_refused_as_it_would_be_written_down(file, url):
    with pytest.raises(ConfigError, match=r"export_to: the URL holds credentials, .*; give them to the driver's environment") as refused:
        read_config(PPOConfig, [file(f"export_to: {url}")])
    assert "RET" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/models", "gs://bucket", "abfs://container@account.dfs.core.windows.net/a@b:c", "hdfs://me@host:8020/x", "hdfs://host:8020", "file:///a:b@c"],
)
def test_a_url_without_credentials_is_taken(url):
    assert read_config(PPOConfig, [f"export_to={url}"]).export_to == url


def test_a_url_with_a_query_is_refused():
    with pytest.raises(ConfigError, match="export_to"):
        read_config(PPOConfig, ["export_to=abfs://account/models?client_secret=no"])
