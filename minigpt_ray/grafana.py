"""A Grafana dashboard of what runs export at Ray's Prometheus endpoint: the panels of the report, live.

    python -m minigpt_ray.grafana > deploy/grafana.json

Import the file into Grafana and choose the Prometheus that scrapes the Ray cluster; logging.prometheus=true exports.
"""

import json
from typing import Any

from minigpt_ray.report.panels import PANELS, Line, Panel
from minigpt_ray.tracking import prometheus_name

SELECTED = 'run=~"$run", stage=~"$stage"'
COLUMNS, WIDTH, HEIGHT = 3, 8, 8
"""Panels in a row, and the size of each on Grafana's grid of 24 columns."""


def dashboard() -> dict[str, Any]:
    """What deploy/grafana.json holds."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "title": "MiniGPT-Ray",
        "uid": "minigpt-ray",
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "tags": ["ray", "rlhf"],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                *({"name": name, "type": "query", "datasource": source, "query": _values(name), "multi": True, "includeAll": True, "refresh": 2} for name in ("run", "stage")),
            ]
        },
        "panels": [_panel(place, panel, source) for place, panel in enumerate(PANELS)],
    }  # fmt: skip


def _values(label: str) -> str:
    return f"label_values(ray_{prometheus_name('train/global_step')}, {label})"


def _panel(place: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    expressions = [(_of_line(line), f"{{{{run}}}} {line.label}") for line in panel.lines]
    if panel.group:
        expressions.append((_of_group(panel), "{{run}} {{__name__}}"))
    scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.caption,
        "datasource": source,
        "gridPos": {"x": place % COLUMNS * WIDTH, "y": place // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"custom": {"scaleDistribution": scale}}, "overrides": []},
        "targets": [{"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend} for i, (expr, legend) in enumerate(expressions)],
    }


def _of_line(line: Line) -> str:
    metric = f"ray_{prometheus_name(line.metric)}{{{SELECTED}}}"
    return f"{metric} / ray_{prometheus_name(line.over)}{{{SELECTED}}}" if line.over else metric


def _of_group(panel: Panel) -> str:
    but = "|".join(f"ray_{prometheus_name(metric)}" for metric in panel.without)
    return f'{{__name__=~"ray_{prometheus_name(panel.group)}.*"' + (f', __name__!~"{but}"' if but else "") + f", {SELECTED}}}"


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
