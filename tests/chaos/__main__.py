"""Harm running PPO jobs in every way that is known, and see whether anything is lost.

    python -m tests.chaos --faults 110                      hours; goes on where it was stopped
    python -m tests.chaos --only driver raylet --faults 4
    python -m tests.chaos --form wide --faults 12           several ranks to a learner, engines in parts
    python -m tests.chaos --form hosts --faults 10          three hosts in network namespaces (as root), which are lost and cut off
    python -m tests.chaos --table docs/chaos.jsonl          what a ledger says, and nothing else

Prints a table, which is made from a ledger with one line per fault. Ends with 1 when a run was lost or its numbers are not
those of a run that nobody touched.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tests.chaos.campaign import Ledger, deal, play
from tests.chaos.faults import FAULTS, of_form
from tests.chaos.on_hosts import world_of_hosts
from tests.chaos.world import FORMS, RewardServer, World


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/chaos"), help="of runs and ledger")
    parser.add_argument("--ledger", type=Path, help="default: ledger.jsonl in that directory; of the campaign on record: docs/chaos.jsonl")
    parser.add_argument("--faults", type=int, default=110, help="how many, all together")
    parser.add_argument("--per-round", type=int, default=6, help="faults of one run")
    parser.add_argument("--steps", type=int, default=22, help="of one run: about three for each of its faults")
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults and of their moments")
    parser.add_argument("--form", choices=list(FORMS), default="narrow", help="of runs: a process to a role, several, or on the hosts of a cluster")
    parser.add_argument("--table", type=Path, metavar="LEDGER", help="print the table of this ledger, and inject nothing")
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), help="kinds of faults; default: all of the form")
    arguments = parser.parse_args()

    if arguments.table:
        print(Ledger(arguments.table).table())
        return 0
    strangers = [name for name in arguments.only or () if FAULTS[name].form != arguments.form]
    if strangers:
        parser.error(f"--form {arguments.form} has nothing to do {', '.join(strangers)} to; give --form {FAULTS[strangers[0]].form}")
    directory = arguments.directory / arguments.form
    ledger = Ledger(arguments.ledger or directory / "ledger.jsonl")
    with _world(arguments.form, directory, arguments.steps) as world:
        print(f"the run that nobody touches: {world.home / 'undisturbed'}", flush=True)
        undisturbed = world.undisturbed()
        dealt = deal(arguments.seed, arguments.faults, arguments.only or of_form(arguments.form))
        rounds = [dealt[start : start + arguments.per_round] for start in range(0, len(dealt), arguments.per_round)]
        for number in range(ledger.rounds + 1, len(rounds) + 1):
            entries = play(world, undisturbed, number, [[name] for name in rounds[number - 1]], arguments.seed, lambda line: print(line, flush=True))
            ledger.add(entries)
            print(f"round {number} of {len(rounds)}: {entries[-1].result if entries else 'nothing was injected'}", flush=True)
    print(ledger.table())
    return int(any(entry.result != "exact" for entry in ledger.entries))


def _world(form: str, directory: Path, steps: int) -> AbstractContextManager[World]:
    if form == "hosts":
        return world_of_hosts(directory, steps)
    return nullcontext(World(directory, steps, *FORMS[form], server=RewardServer()))


if __name__ == "__main__":
    raise SystemExit(main())
