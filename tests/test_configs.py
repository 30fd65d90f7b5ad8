"""Every YAML file in configs/ is a configuration that its job accepts."""

import re
from pathlib import Path

import pytest

import minigpt_ray.config
from jobs.pipeline import plan
from minigpt_ray.cli import read_config, to_yaml
from minigpt_ray.config import JobConfig, MixConfig, PipelineConfig, PPOConfig
from minigpt_ray.config.pipeline import STAGE_CONFIGS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
ROOTS: dict[str, type[JobConfig]] = {
    job.stem: getattr(minigpt_ray.config, match[1])
    for job in (ROOT / "jobs").glob("*.py")
    if (match := re.search(r"load_config\((\w+)", job.read_text(encoding="utf-8")))
}


def root_of(path: Path) -> type[JobConfig]:
    """The root of the job that the file is named after (ppo.yaml, ppo_long.yaml), or that a command in its comments gives it to.

    Mixes of data, in configs/data, are the second kind of file that prepare_data takes.
    """
    if path.is_relative_to(ROOT / "configs" / "data"):
        assert f"python -m jobs.prepare_data {path.relative_to(ROOT).as_posix()}" in path.read_text(encoding="utf-8"), f"{path}: give the command that uses it"
        return MixConfig
    named = [job for job in ROOTS if path.stem == job or path.stem.startswith((f"{job}_", f"{job}-"))]
    used = re.findall(rf"python -m jobs\.(\w+) .*{re.escape(path.relative_to(ROOT).as_posix())}", path.read_text(encoding="utf-8"))
    jobs = named or used
    assert jobs, f"{path}: name it after its job ({', '.join(sorted(ROOTS))}), or give in a comment the command that uses it"
    return ROOTS[jobs[0]]


def test_every_job_has_a_root_and_a_debug_configuration() -> None:
    assert {"prepare_data", "sft", "ppo", "evaluate"} <= ROOTS.keys()
    for job in ROOTS:
        assert (ROOT / "configs" / "debug" / f"{job}.yaml").is_file()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_configuration_loads_with_the_root_of_its_job(path: Path, tmp_path: Path) -> None:
    config = read_config(root_of(path), [str(path)])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(root_of(path), [str(resolved)]) == config


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_configuration_says_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "pipeline.yaml"], ids=lambda path: path.parent.name)
def test_the_stages_of_a_pipeline_load(path: Path) -> None:
    config = read_config(PipelineConfig, [str(path)])
    assert [stage.name for stage in plan(config)] == list(config.only or config.stages)


def test_the_pipeline_of_all_stages_has_them_all() -> None:
    assert list(read_config(PipelineConfig, [str(ROOT / "configs" / "pipeline.yaml")]).stages) == list(STAGE_CONFIGS)


def test_the_debug_stages_share_a_run_and_need_no_gpu() -> None:
    configs = [read_config(root_of(path), [str(path)]) for path in FILES if path.parent.name == "debug"]
    assert len({config.run_dir for config in configs}) == 1
    for config in configs:
        if isinstance(config, PPOConfig):
            place = config.placement
            assert not any(role.gpus for role in (place.generator, place.policy, place.critic, place.reference, place.reward_model))
