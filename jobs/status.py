"""What a run is doing: a live table of its newest stage.

    python -m jobs.status outputs/debug
    python -m jobs.status outputs/debug --once

Step, phase, and for PPO every process with its host and device, every role with its memory, speed, idle share and restarts. Reads files of
the run's directory only, so it works on any machine that sees it, and says when a job that is not finished is silent.
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from minigpt_ray.cli import one_sentence
from minigpt_ray.status import look, status_table


def main(arguments: list[str]) -> None:
    """Print the table, again and again on a terminal while the job lives."""
    parser = argparse.ArgumentParser(prog="python -m jobs.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="as in outputs/debug")
    parser.add_argument("--once", action="store_true", help="print the table and end; so it does without a terminal")
    given = parser.parse_args(arguments)
    console = Console()
    with one_sentence():
        seen = look(given.run)
    if given.once or not console.is_terminal:
        # A pipe has no width of its own; 80 columns would break every row.
        (console if console.is_terminal else Console(width=160)).print(status_table(seen))
        return
    with suppress(KeyboardInterrupt), Live(status_table(seen), console=console) as live:
        while seen.is_alive:
            time.sleep(1)
            seen = look(given.run)
            live.update(status_table(seen))


if __name__ == "__main__":
    main(sys.argv[1:])
