"""Lay runs over each other: one HTML page with the curves of all, and a table of what each stage ended with.

    python -m jobs.compare outputs/demo outputs/demo-1 outputs/demo-2
    python -m jobs.compare --curves curves.svg outputs/demo outputs/demo-1      besides, PPO's held-out exact match: a plot, and a table in Markdown

The page also says in which settings the runs differ, and needs no network.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minigpt_ray.cli import one_sentence
from minigpt_ray.report import Comparison, write_comparison, write_curves


def main(arguments: list[str]) -> None:
    """Write the page, print the table."""
    parser = argparse.ArgumentParser(prog="python -m jobs.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="as in outputs/demo")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page is written; compare.html beside the first run")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="draw PPO's held-out exact match into this SVG file as well, and print it as a table")
    given = parser.parse_args(arguments)
    output = given.output or given.runs[0].resolve().parent / "compare.html"
    with one_sentence():
        comparison = Comparison(given.runs)
        write_comparison(comparison, output)
        if given.curves is not None:
            print(write_curves(given.runs, given.curves))
    console = Console()
    header, cells = comparison.outcomes()
    table = Table()
    for name in header:
        table.add_column(name, justify="left" if name in ("stage", "run") else "right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    # A pipe has no width of its own; 80 columns would break every row.
    (console if console.is_terminal else Console(width=160)).print(table)
    console.print(f"comparison: {output}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
