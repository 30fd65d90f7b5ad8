"""What became of the rows of each source of a mix: a table, and a picture of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from minigpt_ray.config.mix import KINDS
from minigpt_ray.data.mix import DROPPED, Tally

TRAIN, HELD_OUT = "#2563eb", "#059669"
LOST = ("#7f1d1d", "#b91c1c", "#ea580c", "#f59e0b", "#ca8a04", "#a16207", "#4b5563", "#9ca3af", "#e5e7eb")
"""Colours of DROPPED, in its order."""


def table(tallies: Sequence[Tally]) -> Table:
    """Rows by kind and source; reasons that dropped none are left out."""
    reasons = [reason for reason in DROPPED if any(tally.dropped[reason] for tally in tallies)]
    result = Table(caption="share: of the training rows of its kind", pad_edge=False)
    result.add_column("source", min_width=14, overflow="fold")
    for name in ("read", *(reason.replace("_", " ") for reason in reasons), "train", "held out", "share"):
        result.add_column(name, justify="right")
    for kind in KINDS:
        mine = [tally for tally in tallies if tally.kind == kind]
        total = sum(tally.train for tally in mine)
        if mine:
            result.add_row(f"[bold]{kind}")
        for tally in mine:
            dropped = [f"{tally.dropped[reason]:,}" for reason in reasons]
            result.add_row(escape(tally.name), f"{tally.read:,}", *dropped, f"{tally.train:,}", f"{tally.held_out:,}", f"{tally.train / max(1, total):.1%}")
        result.add_section()
    return result


def plot(tallies: Sequence[Tally], path: Path) -> None:
    """An SVG file: for each source what became of its rows, and its share of the training rows of its kind."""
    import matplotlib  # which nothing else here needs, --help and --check least
    from matplotlib.figure import Figure

    reasons = [(reason, color) for reason, color in zip(DROPPED, LOST, strict=True) if any(tally.dropped[reason] for tally in tallies)]
    parts = {"train": [tally.train for tally in tallies], "held out": [tally.held_out for tally in tallies]}
    parts |= {reason.replace("_", " "): [tally.dropped[reason] for tally in tallies] for reason, _ in reasons}
    whole = np.maximum(1, np.sum(list(parts.values()), axis=0))
    totals = {kind: max(1, sum(tally.train for tally in tallies if tally.kind == kind)) for kind in KINDS}
    places = np.arange(len(tallies))
    with matplotlib.rc_context({"svg.hashsalt": "mix", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 1.6 + 0.34 * len(tallies)), layout="constrained")
        fate, share = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        left = np.zeros(len(tallies))
        for (name, counts), color in zip(parts.items(), (TRAIN, HELD_OUT, *(color for _, color in reasons)), strict=True):
            widths = 100 * np.array(counts) / whole
            fate.barh(places, widths, left=left, color=color, label=name)
            left += widths
        share.barh(places, [100 * tally.train / totals[tally.kind] for tally in tallies], color=TRAIN)
        for place, tally in zip(places, tallies, strict=True):
            share.annotate(f" {tally.train:,}", (100 * tally.train / totals[tally.kind], place), va="center")
        fate.set_yticks(places, [f"{tally.kind}: {tally.name}" for tally in tallies], parse_math=False)
        fate.invert_yaxis()
        fate.set(title="What became of the rows", xlabel="% of the source's rows", xlim=(0, 100))
        share.set(title="Training rows", xlabel="% of the kind", xlim=(0, 120), xticks=range(0, 101, 20))
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
