"""Write the report of a run: one HTML page with results, hints, curves, answers, where the time went, configuration.

    python -m jobs.report outputs/debug

Every job that evaluates writes it too. It can be written at any time, also while a stage is running.
"""

import argparse
import sys
from pathlib import Path

from minigpt_ray.cli import one_sentence
from minigpt_ray.report import write_report


def main(arguments: list[str]) -> None:
    """Write <run>/report.html and print its path."""
    parser = argparse.ArgumentParser(prog="python -m jobs.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="as in outputs/debug")
    with one_sentence():
        print(write_report(parser.parse_args(arguments).run))


if __name__ == "__main__":
    main(sys.argv[1:])
