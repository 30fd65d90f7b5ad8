"""docs/placement.md: its commands print its tables, its configurations ask for the GPUs that its headings name."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from minigpt_ray.cli import load_config, read_config
from minigpt_ray.config import PPOConfig
from minigpt_ray.memory import per_process

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "placement.md"
EXAMPLE = re.compile(r"```bash\npython -m jobs\.ppo ([^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL)
EXAMPLES = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
COMMANDS = [shlex.split(command) for command, _ in EXAMPLES]


def dry_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The placement table that a command prints."""
    with pytest.raises(SystemExit) as end:
        load_config(PPOConfig, words)
    assert end.value.code == 0
    out = capsys.readouterr().out
    return "".join(f"{line.rstrip()}\n" for line in out[out.index("Placement") :].splitlines())


def test_every_table_is_what_its_command_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change that is meant to move them: RENEW_GOLDEN=1 .venv/bin/pytest tests/test_placement_doc.py"""
    monkeypatch.chdir(ROOT)
    tables = [dry_run(words, capsys) for words in COMMANDS]
    if "RENEW_GOLDEN" in os.environ:
        left = iter(tables)
        PAGE.write_text(EXAMPLE.sub(lambda m: m[0][: m.start(2) - m.start()] + next(left) + "```", PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    assert tables == [table for _, table in EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("words", "gpus"), list(zip(COMMANDS, (1, 8, 8, 32, 130), strict=True)), ids=lambda value: str(value)[-40:])
def test_an_example_asks_for_its_gpus_and_no_rank_for_more_memory_than_they_have(words: list[str], gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = read_config(PPOConfig, [word for word in words if word != "--dry-run"])
    place = config.placement
    roles = {name: getattr(place, name) for name in ("generator", "policy", "critic", "reference")}
    assert sum(role.ranks * role.gpus for name, role in roles.items() if place.home(name) == name) == gpus
    memory = per_process(config)
    largest = {"policy": 79, "critic": 79, "generator": 79, "reference": 178 if gpus > 32 else 79, "rewards": 1}
    assert set(memory) == {place.home(name) for name in (*roles, "rewards")}
    assert all(gib <= largest[name] for name, gib in memory.items())


def test_every_configuration_of_the_folder_is_an_example() -> None:
    used = {ROOT / word for words in COMMANDS for word in words if "placement" in word}
    assert used == set((ROOT / "configs" / "placement").glob("*.yaml"))


def test_the_page_s_own_section_is_a_configuration(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "placement.yaml").write_text(block)
    assert read_config(PPOConfig, [str(tmp_path / "placement.yaml")]).placement.critic.resources == yaml.safe_load(block)["placement"]["critic"]["resources"]
