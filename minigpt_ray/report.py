"""A run directory -> one self-contained HTML page: results, learning curves, answers, where the time went, configuration.

    python -m minigpt_ray.report outputs/debug
    python -m minigpt_ray.report --curves curves.svg outputs/demo outputs/demo-1      PPO of several runs: a plot, and a table in Markdown

Every stage that wrote a metrics.jsonl gets a chapter; what a stage did not measure is left out. The page needs no network.
"""

import argparse
import html
import io
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minigpt_ray.tracking import read_metrics, read_samples

Metrics = Mapping[str, int | float]
Rows = Sequence[Metrics]
"""Rows of a metrics.jsonl."""

INK, FAINT = "#1f2937", "#9ca3af"
COLORS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#ca8a04", "#0891b2", "#4b5563")
ORDER = ("pretrain", "midtrain", "sft", "reward_model", "dpo", "ppo", "evaluate")
"""Chapters in the order of a model's life; other stages follow."""
ROWS_OF_SAMPLES = 10


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    metric: str
    label: str
    points: bool = False
    """Drawn as marks joined by a line: measured now and then, not in every step."""


@dataclass(frozen=True)
class Panel:
    """One small plot and the sentence that explains it."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    log: bool = False
    noisy: bool = True
    """A long curve is drawn as its moving average, the steps faint behind it."""


PANELS = (
    Panel(
        "Reward",
        "Mean reward of a response, before the KL penalty; dots are held-out prompts, answered greedily. This is what PPO raises.",
        (Line("train/reward", "training, sampled"), Line("eval/mean_reward", "held out, greedy", points=True)),
    ),
    Panel(
        "Held-out exact match",
        "Share of held-out prompts answered exactly right: greedily, and with one answer drawn at temperature 1.",
        (Line("eval/accuracy", "greedy", points=True), Line("eval/sampled_accuracy", "sampled", points=True)),
    ),
    Panel("Loss", "Mean negative log-likelihood, or preference loss, in nats: lower is better; a gap to the validation curve is overfitting.", (Line("train/loss", "training"), Line("validation/loss", "validation", points=True))),
    Panel("Perplexity", "exp(loss): among how many equally likely tokens the model seems to choose.", (Line("train/perplexity", "training"), Line("validation/perplexity", "validation", points=True)), log=True),
    Panel("Accuracy", "Share of tokens, or of preference pairs, that the model ranks first.", (Line("train/accuracy", "training"), Line("validation/accuracy", "validation", points=True))),
    Panel("Reward margin", "Reward of the preferred answer minus that of the other.", (Line("train/reward_margin", "training"), Line("train/margin", "training"), Line("validation/margin", "validation", points=True))),
    Panel("KL to the reference", "How far the policy has moved from where it began, in nats per token; fast growth with little reward is over-optimisation.", (Line("train/kl_ref", "to the reference"),)),
    Panel("KL of one step", "How far the updates of one step move the policy, in nats per token; spikes mean too large a step.", (Line("train/kl", "within the step"),)),
    Panel("Actor loss", "Clipped surrogate loss; its sign and size say little, its jumps do.", (Line("train/actor_loss", "policy"),)),
    Panel("Critic loss", "Half the squared error of the value estimate.", (Line("train/critic_loss", "critic"),)),
    Panel("Explained variance", "How much of the returns' spread the critic foresees: 1 is all of it, 0 is no better than a constant.", (Line("critic/explained_variance", "critic"),)),
    Panel("Entropy", "Spread of the policy's choice of a token, in nats; a fall to 0 ends exploration.", (Line("policy/entropy", "policy"),)),
    Panel("Clipped tokens", "Share of tokens whose ratio has left the clip range, so that they push no further.", (Line("policy/clip_fraction_low", "low"), Line("policy/clip_fraction_high", "high"))),
    Panel(
        "Response length",
        "Tokens in a response. Growth without reward is a sign of gaming.",
        (Line("train/avg_response_len", "mean"), Line("response/length_p95", "95 % quantile"), Line("eval/avg_response_len", "held out", points=True)),
    ),
    Panel("Truncated responses", "Share of responses cut at the length limit.", (Line("response/truncated_fraction", "training"), Line("eval/truncated_fraction", "held out", points=True))),
    Panel("Gradient norm", "Global L2 norm before clipping.", (Line("train/actor_grad_norm", "policy"), Line("train/critic_grad_norm", "critic"), Line("train/grad_norm", "model")), log=True),
    Panel("Learning rate", "As applied by the optimizer.", (Line("train/actor_lr", "policy"), Line("train/critic_lr", "critic"), Line("train/lr", "model")), noisy=False),
    Panel("Generator and learner agree", "Difference between the generator's logprobs and the policy's own, in nats. A rise means wrong weights.", (Line("generator/logprob_gap_mean", "mean"), Line("generator/logprob_gap_max", "largest")), log=True),
    Panel("Throughput", "Tokens per second: response tokens in PPO, tokens read in supervised stages.", (Line("train/tokens_per_second", "tokens/s"),)),
    Panel("Model FLOPs utilisation", "Useful model FLOPs as a percentage of what the devices could do.", (Line("train/mfu_percent", "MFU, %"),)),
)  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path.

    Raises FileNotFoundError when no stage of the run has a metrics.jsonl with a row in it, and no model was evaluated.
    """
    stages = {name: rows for name in _stages(run_dir) if (rows := read_metrics(run_dir / name / "metrics.jsonl"))}
    results = run_dir / "evaluate" / "results.json"
    measured = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    if not stages and not measured:
        raise FileNotFoundError(f"{run_dir}: no <stage>/metrics.jsonl with a row in it; give the directory of a run, as in outputs/debug")
    chapters = [_chapter(name, rows, run_dir / name) for name, rows in stages.items()]
    body = "\n".join([_headline(stages, measured), *chapters])
    page = PAGE.replace("{title}", html.escape(f"MiniGPT-Ray: {run_dir.resolve().name}")).replace("{style}", STYLE).replace("{body}", body)
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _stages(run_dir: Path) -> list[str]:
    found = [path.parent.name for path in run_dir.glob("*/metrics.jsonl")]
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


# ------------------------------------------------------------------------------------------------------ results

HEADLINE = (
    ("exact match, greedy", "eval/accuracy", "{:.1%}"),
    ("exact match, sampled", "eval/sampled_accuracy", "{:.1%}"),
    ("mean reward", "eval/mean_reward", "{:.3f}"),
    ("mean response tokens", "eval/avg_response_len", "{:.1f}"),
)


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
    cells = [[name, *(form.format(row[metric]) if metric in row else "–" for _, metric, form in shown)] for name, row in rows.items()]
    return f"<h2>Held-out results</h2>{_table(['', *(title for title, _, _ in shown)], cells, 'numbers')}"


# ----------------------------------------------------------------------------------------------------- chapters


def _chapter(name: str, rows: Rows, directory: Path) -> str:
    last = max(int(row["step"]) for row in rows)
    parts = [f"<h2>{html.escape(name)} <small>{last:,} steps{_duration(rows)}</small></h2>"]
    panels = [_panel(panel, rows) for panel in PANELS]
    phases = _phases(rows)
    parts.append('<div class="panels">' + "".join(filter(None, [*panels, phases])) + "</div>")
    if (directory / "samples.jsonl").is_file():
        parts.append(_samples(read_samples(directory / "samples.jsonl")))
    if (directory / "config.yaml").is_file():
        parts.append(
            f"<details><summary>Configuration of {html.escape(name)}</summary><pre>{html.escape((directory / 'config.yaml').read_text(encoding='utf-8'))}</pre></details>"
        )
    return "\n".join(filter(None, parts))


def _duration(rows: Rows) -> str:
    seconds = sum(row["time/step_s"] for row in rows if "time/step_s" in row)
    if not seconds:
        return ""
    return f", {seconds / 3600:.1f} h in steps" if seconds >= 5400 else f", {seconds / 60:.1f} min in steps" if seconds >= 90 else f", {seconds:.0f} s in steps"


def series(rows: Rows, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it is a finite number."""
    found = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; at the ends over as much of the window as there is."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _panel(panel: Panel, rows: Rows) -> str:
    """The panel as HTML, or nothing when no line of it was measured."""
    data = [(line, *series(rows, line.metric)) for line in panel.lines]
    data = [(line, steps, values) for line, steps, values in data if len(steps)]
    if not data:
        return ""
    figure, axes = _figure()
    for color, (line, steps, values) in zip(COLORS, data, strict=False):
        if line.points:
            axes.plot(steps, values, "o-", color=color, markersize=4, linewidth=1.2, label=line.label, zorder=3)
        elif panel.noisy and len(values) >= 40:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            axes.plot(steps, smooth(values, max(3, len(values) // 25) | 1), color=color, linewidth=1.6, label=line.label)
        else:
            axes.plot(steps, values, color=color, linewidth=1.4, marker="." if len(values) < 15 else "", label=line.label)
    if panel.log and all((values > 0).all() for _, _, values in data):
        axes.set_yscale("log")
    if len(data) > 1 or data[0][0].points:
        _legend(axes)
    return _framed(panel.title, panel.caption, figure)


def _phases(rows: Rows) -> str:
    """Stacked seconds of the phases of a step; phases within phases are part of the outer one."""
    timed = [row for row in rows if "time/step_s" in row]
    names = list(
        dict.fromkeys(
            name for row in timed for name in row if name.startswith("time/") and name.count("/") == 1 and name.endswith("_s") and name != "time/step_s"
        )
    )
    if len(timed) < 2 or not names:
        return ""
    steps = np.array([row["step"] for row in timed], float)
    seconds = np.nan_to_num(np.array([[row.get(name, 0.0) for row in timed] for name in names], float))
    window = max(1, len(timed) // 50) | 1
    figure, axes = _figure()
    shares = seconds.sum(1) / seconds.sum()
    labels = [f"{name.removeprefix('time/').removesuffix('_s')} {share:.0%}" for name, share in zip(names, shares, strict=True)]
    axes.stackplot(steps, [smooth(row, window) for row in seconds], labels=labels, colors=COLORS, alpha=0.85, linewidth=0)
    axes.set_ylim(0)
    _legend(axes)
    return _framed("Where the time goes", "Seconds of a step by phase, stacked, and each phase's share of the whole stage.", figure)


# ------------------------------------------------------------------------------------------------------ answers


def paired_answers(samples: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """First and last step with held-out answers, and the answers of both to the same prompts; none: (0, 0, [])."""
    evaluated = [row for row in samples if row["kind"] == "eval"]
    steps = sorted({row["step"] for row in evaluated})
    if len(steps) < 2:
        return 0, 0, []
    first, last = ({row["prompt"]: row for row in evaluated if row["step"] == step} for step in (steps[0], steps[-1]))
    return steps[0], steps[-1], [(first[prompt], last[prompt]) for prompt in first if prompt in last]


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    first, last, pairs = paired_answers(samples)
    parts = []
    if pairs:
        cells = [[a["prompt"], a["answer"], a["response"], _reward(a), b["response"], _reward(b)] for a, b in pairs[:ROWS_OF_SAMPLES]]
        header = ["question", "expected", f"answer at step {first}", "reward", f"answer at step {last}", "reward"]
        parts.append(f"<h3>Held-out questions, early and late</h3>{_table(header, cells, 'samples')}")
    trained = [row for row in samples if row["kind"] == "train"]
    if trained:
        half = ROWS_OF_SAMPLES // 2
        chosen = trained if len(trained) <= 2 * half else [*trained[:half], *trained[-half:]]
        cells = [[str(row["step"]), row["prompt"], row["answer"], row["response"], _reward(row)] for row in chosen]
        parts.append(f"<h3>Training samples, first and last</h3>{_table(['step', 'question', 'expected', 'answer', 'reward'], cells, 'samples')}")
    return "".join(parts)


def _reward(row: Mapping[str, Any]) -> str:
    return "–" if row["reward"] is None else f"{row['reward']:.2f}"


# ------------------------------------------------------------------------------------------------- several runs


def write_curves(run_dirs: Sequence[Path], path: Path) -> str:
    """Draw PPO's held-out exact match of several runs into an SVG file; returns the same figures as a table in Markdown.

    Raises FileNotFoundError for a run whose PPO has evaluated nothing.
    """
    figure, axes = _figure()
    table: dict[int, dict[str, str]] = {}
    for run_dir, color in zip(run_dirs, itertools.cycle(COLORS), strict=False):
        rows = read_metrics(run_dir / "ppo" / "metrics.jsonl")
        (steps, greedy), (steps_sampled, sampled) = series(rows, "eval/accuracy"), series(rows, "eval/sampled_accuracy")
        if not len(steps):
            raise FileNotFoundError(f"{run_dir}: no evaluation in ppo/metrics.jsonl; give directories of runs, as in outputs/demo")
        axes.plot(steps, greedy, "o-", color=color, markersize=3, linewidth=1.2, label=f"{run_dir.name}, greedy")
        axes.plot(steps_sampled, sampled, "--", color=color, linewidth=1, label=f"{run_dir.name}, sampled")
        by_step = dict(zip(steps_sampled, sampled, strict=True))
        for step, value in zip(steps, greedy, strict=True):
            table.setdefault(int(step), {})[run_dir.name] = f"{value:.1%} / {by_step[step]:.1%}" if step in by_step else f"{value:.1%}"
    axes.set_xlabel("PPO step")
    axes.set_title("Held-out exact match", fontsize=9, pad=50)
    _legend(axes, columns=2)
    path.write_text(_svg(figure, path.stem), encoding="utf-8")
    names = [run_dir.name for run_dir in run_dirs]
    lines = [["step", *names], ["---:"] * (1 + len(names)), *([str(step), *(table[step].get(name, "") for name in names)] for step in sorted(table))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ------------------------------------------------------------------------------------------------------- drawing

DRAWING: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and it can be searched
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.useoffset": False,
}


def _figure() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
    return figure, axes


def _legend(axes: Axes, columns: int = 3) -> None:
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handlelength=1.2, columnspacing=1.0)


def _framed(title: str, caption: str, figure: Figure) -> str:
    return f"<figure><h4>{html.escape(title)}</h4>{_svg(figure, title)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element; `salt` keeps its ids apart from those of other figures on the page."""
    text = io.StringIO()
    with matplotlib.rc_context(DRAWING | {"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]], kind: str) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape('–' if cell is None else str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 1320px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; padding-bottom: .3rem; }
h2 small { color: #6b7280; font-weight: normal; font-size: .9rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } h4 { margin: 0; font-size: .95rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1.6rem 1.4rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: #6b7280; font-size: .82rem; line-height: 1.35; }
table { border-collapse: collapse; font-size: .88rem; } th { text-align: left; color: #6b7280; font-weight: 600; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #f3f4f6; vertical-align: top; }
table.numbers td + td, table.numbers th + th { text-align: right; font-variant-numeric: tabular-nums; padding-left: 1.6rem; }
table.samples td { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 26rem; font-family: ui-monospace, monospace; font-size: .8rem; }
.scroll { overflow-x: auto; } pre { font-size: .8rem; background: #f9fafb; padding: 1rem; overflow-x: auto; } details { margin-top: 1.2rem; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def main(arguments: list[str]) -> None:
    """`python -m minigpt_ray.report RUN_DIR`, or `--curves FILE.svg RUN_DIR ...`"""
    parser = argparse.ArgumentParser(prog="python -m minigpt_ray.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="as in outputs/debug")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="draw PPO's held-out exact match of all runs into this SVG file, and print it as a table")
    given = parser.parse_args(arguments)
    if given.curves is None and len(given.runs) > 1:
        parser.error("a report is of one RUN_DIR; several go with --curves FILE")
    try:
        print(write_report(given.runs[0]) if given.curves is None else write_curves(given.runs, given.curves))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
