"""The page of one run: results at the top, then a chapter for each stage in the order of a model's life."""

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path

from minigpt_ray.report.chapter import chapter
from minigpt_ray.report.curves import Metrics, Rows
from minigpt_ray.report.drawing import page, table
from minigpt_ray.tracking import read_metrics

ORDER = ("pretrain", "midtrain", "sft", "reward_model", "dpo", "ppo", "evaluate")
"""Chapters in the order of a model's life; other stages follow."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path.

    Raises FileNotFoundError when no stage of the run has a metrics.jsonl with a row in it, and no model was evaluated.
    """
    stages = read_stages(run_dir)
    measured = read_results(run_dir)
    if not stages and not measured:
        raise FileNotFoundError(f"{run_dir}: no <stage>/metrics.jsonl with a row in it; give the directory of a run, as in outputs/debug")
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in stages)
    chapters = [chapter(name, rows, run_dir / name) for name, rows in stages.items()]
    path = run_dir / "report.html"
    part = path.with_name(f".{path.name}.partial")
    part.write_text(
        page(f"MiniGPT-Ray: {run_dir.resolve().name}", "\n".join([f"<nav>{links}</nav>", _headline(stages, measured), *chapters])), encoding="utf-8"
    )
    part.replace(path)  # a browser may read it meanwhile
    return path


def read_stages(run_dir: Path) -> dict[str, Rows]:
    """The rows of every stage that has some, in the order of a model's life."""
    found = [path.parent.name for path in run_dir.glob("*/metrics.jsonl")]
    names = sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: rows for name in names if (rows := read_metrics(run_dir / name / "metrics.jsonl"))}


def read_results(run_dir: Path) -> dict[str, Metrics]:
    """What jobs.evaluate has found about each model; empty when it has not run."""
    path = run_dir / "evaluate" / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


HEADLINE = (
    ("exact match, greedy", "eval/accuracy", "{:.1%}"),
    ("exact match, sampled", "eval/sampled_accuracy", "{:.1%}"),
    ("mean reward", "eval/mean_reward", "{:.3f}"),
    ("mean response tokens", "eval/avg_response_len", "{:.1f}"),
)

REWARDS_DIFFER = "Mean reward: in an evaluation of PPO that of its own sources and their weights, above it that of the sources of jobs.evaluate."


def headline_rows(stages: Mapping[str, Rows], measured: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """Held-out results by what they are of: the models of results.json, then PPO's own first, best and last evaluation.

    results.json: `{model: {"eval/accuracy": ..., ...}}`, by the names that evaluation rows of metrics.jsonl have.
    """
    rows: dict[str, Metrics] = dict(measured)
    for stage, metrics in stages.items():
        evaluations = [row for row in metrics if "eval/accuracy" in row]
        if not evaluations:
            continue
        best = max(evaluations, key=lambda row: -math.inf if math.isnan(row["eval/accuracy"]) else row["eval/accuracy"])
        rows[f"{stage}, first evaluation (step {evaluations[0]['step']})"] = evaluations[0]
        if best is not evaluations[0] and best is not evaluations[-1]:
            rows[f"{stage}, best evaluation (step {best['step']})"] = best
        if len(evaluations) > 1:
            rows[f"{stage}, last evaluation (step {evaluations[-1]['step']})"] = evaluations[-1]
    return rows


def _headline(stages: Mapping[str, Rows], measured: Mapping[str, Metrics]) -> str:
    rows = headline_rows(stages, measured)
    if not rows:
        return ""
    shown = [column for column in HEADLINE if any(column[1] in row for row in rows.values())]
    cells = [[name, *(_cell(row, metric, form) for _, metric, form in shown)] for name, row in rows.items()]
    note = f'<p class="calm">{REWARDS_DIFFER}</p>' if measured and len(rows) > len(measured) else ""
    return f"<h2>Held-out results</h2>{table(['', *(title for title, _, _ in shown)], cells, 'numbers')}{note}"


def _cell(row: Metrics, metric: str, form: str) -> str:
    """The figure, and the ends of its confidence interval where they are known."""
    if metric not in row:
        return "–"
    interval = f" ({form.format(row[f'{metric}_low'])} to {form.format(row[f'{metric}_high'])})" if f"{metric}_low" in row else ""
    return form.format(row[metric]) + interval
