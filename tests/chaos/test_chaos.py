"""One fault of every role in a running job; `make chaos` injects many more, and prints a table of them."""

import re
from pathlib import Path

import pytest

from minigpt_ray.tracking import read_metrics
from tests.chaos.campaign import Entry, Ledger, deal, play
from tests.chaos.faults import FAULTS, of_form
from tests.chaos.world import FORMS, RewardServer, World
from tests.jobs.runs import CHECKOUT

MOMENTS = (("reference", "reward_model", "server_hangs"), ("generator", "function"), ("policy", "critic"))
"""The critic's death is that of the process that asks the server, which then cannot say that it got no answer."""
ROLES = [role for moment in MOMENTS for role in moment]


@pytest.mark.slow
def test_a_run_outlives_a_process_of_every_role_with_the_numbers_of_one_that_lost_none(tmp_path: Path) -> None:
    together = "placement.colocate=[[critic, rewards]]"  # so that the critic's death is that of the rewards as well
    world = World(tmp_path, 10, *FORMS["narrow"], together, server=RewardServer())
    entries = play(world, world.undisturbed(), 1, MOMENTS, seed=0, say=print)
    assert [entry.fault for entry in entries] == ROLES
    assert [(entry.fault, entry.result) for entry in entries] == [(role, "exact") for role in ROLES]
    assert not [entry.fault for entry in entries if not entry.said]
    last = [row for row in read_metrics(tmp_path / "round-001" / "ppo" / "metrics.jsonl") if "train/epoch" in row][-1]
    restarts = {role: last[f"restarts/{role}"] for role in ("reference", "reward_model_0", "generator", "policy", "critic", "rewards", "driver")}
    assert (
        restarts.pop("policy") == restarts.pop("critic") == restarts.pop("rewards") >= 1
    )  # twice when the critic was killed after it had been replaced with the policy
    assert restarts == {"reference": 1, "reward_model_0": 1, "generator": 1, "driver": 0}


def test_every_kind_of_fault_is_dealt_as_often_as_any_other() -> None:
    names = of_form("narrow")
    dealt = deal(seed=1, faults=2 * len(names), names=names)
    assert sorted(dealt) == sorted(2 * names) and dealt != deal(seed=2, faults=len(dealt), names=names)
    assert sorted(name for form in FORMS for name in of_form(form)) == sorted(FAULTS)


@pytest.mark.parametrize("ledger", ["chaos.jsonl", "chaos_wide.jsonl", "chaos_hosts.jsonl"])
def test_the_tables_on_record_are_those_of_the_ledgers(ledger: str) -> None:
    entries = Ledger(CHECKOUT / "docs" / ledger)
    assert entries.entries and entries.table() in (CHECKOUT / "docs" / "reliability.md").read_text()


def test_a_ledger_goes_on_and_counts_what_was_lost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add([Entry(1, "driver", 3, "learn", 2, 31.0, "the driver was killed", "exact"), Entry(1, "driver", 9, "rollout", 0, 41.0, "", "lost")])
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.rounds == 1
    row = next(line for line in again.table().splitlines() if line.startswith("| driver"))
    assert re.split(r" *\| *", row)[2:-1] == ["2", "1", "1", "1", "2", "36 (41)"]
