"""The chapter of one stage: hints, curves, where the time went, answers, configuration and versions."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from minigpt_ray.report.answers import answer_tables
from minigpt_ray.report.curves import Rows, draw_panel, series, smooth
from minigpt_ray.report.drawing import COLORS, FAINT, INK, folded, framed, legend, new_curves, new_figure, preformatted, table
from minigpt_ray.report.hints import Hint, hints
from minigpt_ray.report.panels import PANELS
from minigpt_ray.tracking import read_samples


def chapter(name: str, rows: Rows, directory: Path) -> str:
    """HTML of a stage; what it did not measure, or has not written yet, is left out."""
    settings = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")) if (directory / "config.yaml").is_file() else {}
    found = hints(name, rows)
    flagged = {hint.panel for hint in found}
    figures = [(panel.title, panel.caption, draw_panel(panel, {name: rows})) for panel in PANELS]
    figures += [
        ("Reward against KL", "Each point is a step, from the first (pale) to the last (dark): what a nat of distance from the reference has bought.", reward_by_kl(rows)),
        ("Where the time goes", "Seconds of a step by phase, stacked, and each phase's share of the whole stage.", seconds_by_phase(rows)),
        ("Timeline of a step", "The phases of an average step one after another, their parts below them, and how much of it each role computes.", timeline(rows)),
    ]  # fmt: skip
    plots = [framed(title, caption, figure, name, title in flagged) for title, caption, figure in figures if figure is not None]
    samples = read_samples(directory / "samples.jsonl") if (directory / "samples.jsonl").is_file() else []
    parts = [
        f'<h2 id="{html.escape(name)}">{html.escape(name)} <small>{_progress(rows, settings)}{_duration(rows)}</small></h2>',
        _hints(found),
        f'<div class="panels">{"".join(plots)}</div>',
        *answer_tables(samples),
        *_made_by(name, directory),
    ]
    return "\n".join(parts)


def _progress(rows: Rows, settings: dict[str, Any]) -> str:
    last, planned = max(int(row["step"]) for row in rows), settings.get("steps")
    return f"{last:,} of {planned:,} steps" if isinstance(planned, int) and last < planned else f"{last:,} steps"


def _duration(rows: Rows) -> str:
    seconds = sum(row["time/step_s"] for row in rows if "time/step_s" in row)
    if not seconds:
        return ""
    return f", {seconds / 3600:.1f} h in steps" if seconds >= 5400 else f", {seconds / 60:.1f} min in steps" if seconds >= 90 else f", {seconds:.0f} s in steps"


def _hints(found: list[Hint]) -> str:
    if not found:
        return '<p class="calm">No value that was measured is outside its healthy range.</p>'
    items = (f"<li><b>{html.escape(h.panel)}.</b> {html.escape(h.found)} {html.escape(h.means)} <i>Try:</i> {html.escape(h.remedy)}.</li>" for h in found)
    return f'<div class="hints"><b>Worth a look</b><ul>{"".join(items)}</ul></div>'


def _made_by(name: str, directory: Path) -> Iterator[str]:
    if (directory / "versions.json").is_file():
        versions = json.loads((directory / "versions.json").read_text(encoding="utf-8"))
        yield folded(f"Versions that {name} ran with", table(["", "version"], versions.items(), "versions"))
    if (directory / "config.yaml").is_file():
        yield folded(f"Configuration of {name}", preformatted((directory / "config.yaml").read_text(encoding="utf-8")))


# --------------------------------------------------------------------------------------- figures of a kind of their own


def reward_by_kl(rows: Rows) -> Figure | None:
    """train/reward over train/kl_ref, both smoothed, as a path through the steps."""
    both = [row for row in rows if "train/kl_ref" in row and "train/reward" in row]
    (at, kl), (steps, reward) = series(both, "train/kl_ref"), series(both, "train/reward")
    steps, kl_places, reward_places = np.intersect1d(at, steps, return_indices=True)
    if len(steps) < 2:
        return None
    window = max(3, len(steps) // 10) | 1
    x, y = smooth(kl[kl_places], window), smooth(reward[reward_places], window)
    figure, axes = new_figure()
    axes.plot(x, y, color=FAINT, linewidth=0.6)
    axes.scatter(x, y, c=steps, cmap="Blues", vmin=steps[0] - 0.4 * (steps[-1] - steps[0]), s=14, linewidths=0, zorder=3)
    axes.set_xlabel("KL to the reference, nats per token")
    axes.set_ylabel("reward")
    return figure


def _phases(rows: Rows, depth: int) -> list[str]:
    """Metrics of the phases of a step in the order in which they ended; `depth` 0: the phases themselves, 1: their parts."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("time/") and name.endswith("_s") and "idle_share" not in name)
    return [name for name in names if name.count("/") == 1 + depth and name not in ("time/step_s", "time/overhead_s")]


def _seconds(rows: Rows, names: list[str]) -> np.ndarray:
    """(phases, steps)."""
    return np.nan_to_num(np.array([[row.get(name, 0.0) for row in rows] for name in names], float))


def _label(name: str) -> str:
    return name.removeprefix("time/").removesuffix("_s")


def seconds_by_phase(rows: Rows) -> Figure | None:
    """Stacked seconds of the phases of a step; phases within phases are part of the outer one."""
    timed = [row for row in rows if "time/step_s" in row]
    names = _phases(timed, 0)
    if len(timed) < 2 or not names:
        return None
    steps = np.array([row["step"] for row in timed], float)
    seconds = _seconds(timed, names)
    window = max(1, len(timed) // 50) | 1
    figure, axes = new_curves()
    shares = seconds.sum(1) / seconds.sum()
    labels = [f"{_label(name)} {share:.0%}" for name, share in zip(names, shares, strict=True)]
    axes.stackplot(steps, [smooth(row, window) for row in seconds], labels=labels, colors=COLORS, alpha=0.85, linewidth=0)
    axes.set_ylim(0)
    legend(axes)
    return figure


def timeline(rows: Rows) -> Figure | None:
    """Phases of a mean step as bars along its seconds, parts of phases below, then each role's share of computing."""
    timed = [row for row in rows if "time/step_s" in row]
    names = _phases(timed, 0)
    roles = list(dict.fromkeys(name for row in timed for name in row if name.startswith("time/idle_share/")))
    if len(timed) < 2 or not names or not roles:
        return None
    length = dict(zip(names, _seconds(timed, names).mean(1), strict=True))
    starts = dict(zip(names, np.cumsum([0.0, *length.values()]), strict=False))
    total = sum(length.values())
    figure, axes = new_figure(height=1.1 + 0.24 * (1 + len(roles)))
    labels = ["phases"]
    for place, name in enumerate(names):
        axes.barh(0, length[name], left=starts[name], color=COLORS[place % len(COLORS)], height=0.62)
        if length[name] > 0.12 * total:
            axes.text(starts[name] + length[name] / 2, 0, _label(name), color="white", fontsize=8, ha="center", va="center")
    parts = _phases(timed, 1)
    if parts:
        labels.append("parts")
        ends = dict(starts)
        for name, seconds in zip(parts, _seconds(timed, parts).mean(1), strict=True):
            outer = f"{name.rpartition('/')[0]}_s"
            axes.barh(1, seconds, left=ends[outer], color=COLORS[names.index(outer) % len(COLORS)], alpha=0.55, height=0.62)
            if seconds > 0.12 * total:
                axes.text(ends[outer] + seconds / 2, 1, name.rpartition("/")[2].removesuffix("_s"), color=INK, fontsize=8, ha="center", va="center")
            ends[outer] += seconds
    for name in roles:
        idle = series(timed, name)[1]
        busy = 1 - float(idle.mean()) if len(idle) else 0.0
        axes.barh(len(labels), total, color="#f3f4f6", height=0.62)
        axes.barh(len(labels), busy * total, color=FAINT, height=0.62)
        axes.text(total, len(labels), f"computes {busy:.0%} ", color=INK, fontsize=8, ha="right", va="center")
        labels.append(name.removeprefix("time/idle_share/"))
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, total)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    return figure
