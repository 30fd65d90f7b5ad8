"""What became of the stages of a run: a table for the end of a pipeline."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from minigpt_ray.tracking import read_metrics

HEADLINES = {
    "validation/perplexity": "perplexity {:.2f}",
    "validation/unigram_perplexity": "unigrams {:.2f}",
    "validation/accuracy": "accuracy {:.1%} on held-out pairs",
    "validation/margin": "margin {:.2f}",
    "eval/accuracy": "exact match {:.1%}",
    "eval/sampled_accuracy": "sampled {:.1%}",
}
"""Metric -> how its last value is told."""


def course_table(run_dir: Path, fates: Mapping[str, str], seconds: Mapping[str, float]) -> Table:
    """A row for each stage: what happened, how long it took, and what it came to, with what evaluate found out about its model; then the time of all."""
    evaluated = _read(results) if "evaluate" in fates and (results := run_dir / "evaluate" / "results.json").exists() else {}
    table = Table("stage", "", "time", "outcome on held-out data")
    for name, fate in fates.items():
        table.add_row(name, fate, _time(seconds.get(name, 0.0)), outcome(run_dir / name, evaluated.get(name, {})))
    table.add_section()
    table.add_row("all", "", _time(sum(seconds.get(name, 0.0) for name in fates)), "")
    return table


def outcome(directory: Path, evaluated: Mapping[str, float]) -> str:
    """The last held-out numbers that a stage logged, and those of `evaluated`; for the data jobs the rows they wrote; for evaluate the accuracy of every model."""
    if (results := directory / "results.json").exists():
        return ", ".join(f"{model} {row['eval/accuracy']:.1%}" for model, row in _read(results).items() if "eval/accuracy" in row)
    if (metrics := directory / "metrics.jsonl").exists():
        last: dict[str, float] = {}
        for row in (*read_metrics(metrics), evaluated):
            last |= row
        return ", ".join(text.format(last[name]) for name, text in HEADLINES.items() if name in last)
    if (manifest := directory / "manifest.json").exists():
        counts = {name: sum(count.values()) if isinstance(count, dict) else count for name, count in _read(manifest)["counts"].items()}
        return ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return ""


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
