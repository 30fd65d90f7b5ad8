"""Rows of metrics.jsonl -> curves: series of a metric, smoothing, and the drawing of a panel for one run or several."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from minigpt_ray.report.drawing import COLORS, legend, new_curves
from minigpt_ray.report.panels import Line, Panel

Metrics = Mapping[str, int | float]
Rows = Sequence[Metrics]
"""Rows of a metrics.jsonl."""

DASHES = ("-", "--", ":", "-.")


def series(rows: Rows, metric: str, over: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, or of its ratio to another, where that is a finite number."""
    found = [(row["step"], row[metric] / row[over] if over else row[metric]) for row in rows if metric in row and (not over or row.get(over))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return np.array([step for step, _ in finite], float), np.array([value for _, value in finite], float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average, as long as `values`; at the ends over as much of the window as there is."""
    kernel = np.ones(min(window, (len(values) - 1) | 1))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def lines_of(panel: Panel, rows: Rows) -> Iterator[Line]:
    """The panel's own lines, then one for each metric of its group."""
    yield from panel.lines
    if panel.group:
        names = dict.fromkeys(name for row in rows for name in row if name.startswith(panel.group) and name not in panel.without)
        yield from (Line(name, name.removeprefix(panel.group).removesuffix("_gib")) for name in names)


def draw_panel(panel: Panel, runs: Mapping[str, Rows]) -> Figure | None:
    """The panel's curves for each run, or None when nobody measured them, or nothing but zeros that say nothing.

    Of one run, each line has a colour. Of several, each run has a colour and each line a kind of dash.
    """
    measured = [
        (run, line, *points)
        for run, rows in enumerate(runs.values())
        for line in lines_of(panel, rows)
        if len((points := series(rows, line.metric, line.over))[0])
    ]
    if not measured or (panel.zero_says_nothing and not any(values.any() for *_, values in measured)):
        return None
    names, labels = list(runs), list(dict.fromkeys(line.label for _, line, _, _ in measured))
    single, several_lines = len(runs) == 1, len(labels) > 1
    figure, axes = new_curves()
    colors = itertools.cycle(COLORS)
    for run, line, steps, values in measured:
        color = next(colors) if single else COLORS[run % len(COLORS)]
        dash = "-" if single else DASHES[labels.index(line.label) % len(DASHES)]
        label = line.label if single else f"{names[run]}, {line.label}" if several_lines else names[run]
        if line.points:
            axes.plot(steps, values, dash, color=color, marker="o", markersize=4, linewidth=1.2, label=label, zorder=3)
        elif panel.noisy and len(values) >= 40:
            if single:
                axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            axes.plot(steps, smooth(values, max(3, len(values) // 25) | 1), dash, color=color, linewidth=1.6, label=label)
        else:
            axes.plot(steps, values, dash, color=color, linewidth=1.4, marker="." if len(values) < 15 else "", label=label)
    if panel.log and all((values > 0).all() for *_, values in measured):
        axes.set_yscale("log")
    if not single or len(measured) > 1 or measured[0][1].points:
        legend(axes, columns=3 if single or not several_lines else 2)
    return figure
