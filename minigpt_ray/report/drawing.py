"""How the report looks: figures as SVG, tables and the page around them. Nothing here knows what a metric is."""

import html
import io
from collections.abc import Iterable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GREY, FAINT = "#1f2937", "#6b7280", "#9ca3af"
COLORS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#ca8a04", "#0891b2", "#4b5563")

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
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.useoffset": False,
}


def new_figure(height: float = 2.4) -> tuple[Figure, Axes]:
    """An empty plot, `height` in inches."""
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.subplots()
        axes.margins(x=0.02)
    return figure, axes


def new_curves() -> tuple[Figure, Axes]:
    """An empty plot over steps."""
    figure, axes = new_figure()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def legend(axes: Axes, columns: int = 3) -> None:
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handlelength=1.2, columnspacing=1.0)


def framed(title: str, caption: str, figure: Figure, salt: str, flagged: bool = False) -> str:
    """A figure with its title above and its explanation below; `flagged` marks it as one that a hint is about."""
    kind = ' class="flagged"' if flagged else ""
    return f"<figure{kind}><h4>{html.escape(title)}</h4>{svg(figure, f'{salt} {title}')}<figcaption>{html.escape(caption)}</figcaption></figure>"


def svg(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element; `salt` keeps its ids apart from those of other figures on the page."""
    text = io.StringIO()
    with matplotlib.rc_context(DRAWING | {"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], kind: str) -> str:
    """An HTML table of the class `kind`; None is shown as a dash."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape('–' if cell is None else str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """HTML that is shown once its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def page(title: str, body: str) -> str:
    """The whole HTML document."""
    return PAGE.replace("{title}", html.escape(title)).replace("{style}", STYLE).replace("{body}", body)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 1320px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e5e7eb; padding-bottom: .3rem; }
h2 small { color: #6b7280; font-weight: normal; font-size: .9rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } h4 { margin: 0; font-size: .95rem; }
nav { color: #6b7280; margin-top: .4rem; } nav a { margin-right: .8rem; } a { color: #2563eb; text-decoration: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1.6rem 1.4rem; margin-top: 1.2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: #6b7280; font-size: .82rem; line-height: 1.35; }
figure svg text { font-family: system-ui, sans-serif !important; }
figure.flagged { box-shadow: -4px 0 #f59e0b; padding-left: .7rem; margin-left: -.7rem; }
.hints { background: #fffbeb; border-left: 4px solid #f59e0b; padding: .6rem 1rem; margin: 1rem 0; max-width: 62rem; }
.hints ul { margin: .3rem 0; padding-left: 1.2rem; } .hints li { margin: .35rem 0; } .calm { color: #6b7280; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; } th { text-align: left; color: #6b7280; font-weight: 600; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #f3f4f6; vertical-align: top; }
table.numbers td + td, table.numbers th + th { text-align: right; font-variant-numeric: tabular-nums; padding-left: 1.6rem; }
table.samples td { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 24rem; font-family: ui-monospace, monospace; font-size: .8rem; }
.scroll { overflow-x: auto; } pre { font-size: .8rem; background: #f9fafb; padding: 1rem; overflow-x: auto; }
details { margin-top: 1.2rem; } summary { cursor: pointer; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
