"""Several runs beside each other: curves laid over each other, what they ended with, and in which settings they differ."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minigpt_ray.report.curves import Rows, draw_panel, series
from minigpt_ray.report.drawing import COLORS, framed, legend, new_curves, page, svg, table
from minigpt_ray.report.hints import newest
from minigpt_ray.report.page import ORDER, headline_rows, read_results, read_stages
from minigpt_ray.report.panels import PANELS
from minigpt_ray.tracking import read_metrics

OUTCOMES = (
    ("exact match", "eval/accuracy", "{:.1%}"),
    ("sampled", "eval/sampled_accuracy", "{:.1%}"),
    ("reward", "train/reward", "{:.3f}"),
    ("loss", "train/loss", "{:.3f}"),
    ("validation loss", "validation/loss", "{:.3f}"),
    ("validation accuracy", "validation/accuracy", "{:.1%}"),
    ("KL to reference", "train/kl_ref", "{:.3f}"),
    ("response tokens", "train/avg_response_len", "{:.1f}"),
    ("tokens/s", "train/tokens_per_second", "{:,.0f}"),
)
"""What a stage ended with: of what is evaluated now and then the last value, else the mean of the newest tenth of the steps."""

SETTINGS_OF_THE_PLACE = ("run", "output_dir")


class Comparison:
    """The stages, results and settings of several runs, by the names of their directories.

    Raises FileNotFoundError for a directory without a stage that has measured something, ValueError for one that is given twice.
    """

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        paths = [run_dir.resolve() for run_dir in run_dirs]
        if len(set(paths)) < len(paths):
            raise ValueError("a run is given twice; give each once")
        short = [path.name for path in paths]
        self.names = short if len(set(short)) == len(short) else [str(run_dir) for run_dir in run_dirs]
        self.runs = {name: read_stages(path) for name, path in zip(self.names, paths, strict=True)}
        self.results = {name: read_results(path) for name, path in zip(self.names, paths, strict=True)}
        for name, path in zip(self.names, paths, strict=True):
            if not self.runs[name] and not self.results[name]:
                raise FileNotFoundError(f"{path}: no <stage>/metrics.jsonl with a row in it; give directories of runs, as in outputs/demo")
        found = dict.fromkeys(stage for stages in self.runs.values() for stage in stages)
        self.stages = sorted(found, key=lambda stage: (ORDER.index(stage) if stage in ORDER else len(ORDER), stage))
        self.settings = {stage: {name: _settings(path / stage) for name, path in zip(self.names, paths, strict=True)} for stage in self.stages}

    def outcomes(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells of the table: a row for each stage of each run, a column for each figure that some stage has."""
        stages = [(stage, name, rows) for stage in self.stages for name, rows in self._of(stage).items()]
        shown = [column for column in OUTCOMES if any(len(series(rows, column[1])[0]) for _, _, rows in stages)]
        cells = [
            [stage, name, str(max(int(row["step"]) for row in rows)), *(_outcome(rows, metric, form) for _, metric, form in shown)]
            for stage, name, rows in stages
        ]
        return ["stage", "run", "steps", *(title for title, _, _ in shown)], cells

    def differences(self, stage: str) -> list[list[str]]:
        """Settings of a stage in which its runs differ: the dotted field, then its value in each run."""
        settings = {name: self.settings[stage][name] for name in self._of(stage)}
        fields = dict.fromkeys(field for values in settings.values() for field in values)
        rows = [[field, *(str(values.get(field, "–")) for values in settings.values())] for field in fields]
        return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in SETTINGS_OF_THE_PLACE]

    def html(self) -> str:
        """One self-contained page."""
        links = "".join(f'<a href="#{html.escape(stage)}">{html.escape(stage)}</a>' for stage in self.stages)
        return page(f"MiniGPT-Ray: {', '.join(self.names)}", "\n".join([f"<nav>{links}</nav>", *self._results(), *map(self._chapter, self.stages)]))

    def _of(self, stage: str) -> dict[str, Rows]:
        return {name: stages[stage] for name, stages in self.runs.items() if stage in stages}

    def _results(self) -> Iterator[str]:
        yield f"<h2>What the runs ended with</h2>{table(*self.outcomes(), 'numbers')}"
        measured = {f"{name}: {model}": figures for name in self.names for model, figures in headline_rows({}, self.results[name]).items()}
        if measured:
            cells = [[model, *(form.format(figures[m]) if m in figures else "–" for _, m, form in OUTCOMES[:2])] for model, figures in measured.items()]
            yield f"<h3>Evaluated models</h3>{table(['', 'exact match', 'sampled'], cells, 'numbers')}"

    def _chapter(self, stage: str) -> str:
        runs = self._of(stage)
        figures = [(panel, draw_panel(panel, {name: runs.get(name, ()) for name in self.names})) for panel in PANELS]
        plots = [framed(panel.title, panel.caption, figure, stage) for panel, figure in figures if figure is not None]
        different = self.differences(stage)
        if different:
            settings = f"<h3>Settings that differ</h3>{table(['', *runs], different, 'samples')}"
        else:
            settings = f'<p class="calm">{"The settings are the same." if len(runs) > 1 else f"Only in {html.escape(next(iter(runs)))}."}</p>'
        return f'<h2 id="{html.escape(stage)}">{html.escape(stage)}</h2>{settings}<div class="panels">{"".join(plots)}</div>'


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comparison.html(), encoding="utf-8")


def write_curves(run_dirs: Sequence[Path], path: Path) -> str:
    """Draw PPO's held-out exact match of several runs into an SVG file; returns the same figures as a table in Markdown.

    Raises FileNotFoundError for a run whose PPO has evaluated nothing.
    """
    figure, axes = new_curves()
    cells: dict[int, dict[str, str]] = {}
    for run_dir, color in zip(run_dirs, itertools.cycle(COLORS), strict=False):
        rows = read_metrics(run_dir / "ppo" / "metrics.jsonl")
        (steps, greedy), (steps_sampled, sampled) = series(rows, "eval/accuracy"), series(rows, "eval/sampled_accuracy")
        if not len(steps):
            raise FileNotFoundError(f"{run_dir}: no evaluation in ppo/metrics.jsonl; give directories of runs, as in outputs/demo")
        axes.plot(steps, greedy, "o-", color=color, markersize=3, linewidth=1.2, label=f"{run_dir.name}, greedy")
        axes.plot(steps_sampled, sampled, "--", color=color, linewidth=1, label=f"{run_dir.name}, sampled")
        by_step = dict(zip(steps_sampled, sampled, strict=True))
        for step, value in zip(steps, greedy, strict=True):
            cells.setdefault(int(step), {})[run_dir.name] = f"{value:.1%} / {by_step[step]:.1%}" if step in by_step else f"{value:.1%}"
    axes.set_xlabel("PPO step")
    axes.set_title("Held-out exact match", fontsize=9, pad=50)
    legend(axes, columns=2)
    path.write_text(svg(figure, path.stem), encoding="utf-8")
    names = [run_dir.name for run_dir in run_dirs]
    lines = [["step", *names], ["---:"] * (1 + len(names)), *([str(step), *(cells[step].get(name, "") for name in names)] for step in sorted(cells))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _outcome(rows: Rows, metric: str, form: str) -> str:
    values = series(rows, metric)[1]
    if not len(values):
        return "–"
    return form.format(values[-1] if metric.startswith(("eval/", "validation/")) else newest(rows, metric))


def _settings(directory: Path) -> dict[str, Any]:
    """Dotted fields of a stage's config.yaml; empty without one."""
    path = directory / "config.yaml"
    return dict(_leaves(yaml.safe_load(path.read_text(encoding="utf-8")))) if path.is_file() else {}


def _leaves(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value
