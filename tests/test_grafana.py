"""deploy/grafana.json is what the code makes of the report's panels, and asks for metrics that exist."""

import json
import re
from pathlib import Path

from minigpt_ray.grafana import dashboard
from minigpt_ray.tracking import prometheus_name
from tests.test_metrics_doc import ROWS

FILE = Path(__file__).parents[1] / "deploy" / "grafana.json"
DOCUMENTED = [re.sub("<.*?>", "x", row) for row in ROWS]
EXPORTED = {f"ray_{prometheus_name(name)}" for name in DOCUMENTED}


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_file_is_current() -> None:
    """Else: python -m minigpt_ray.grafana > deploy/grafana.json"""
    assert json.loads(FILE.read_text()) == dashboard()


def test_every_query_asks_for_documented_metrics_of_the_chosen_run() -> None:
    assert len(queries()) > 40
    for query in queries():
        assert 'run=~"$run", stage=~"$stage"' in query
        named = re.findall(r"(?<![\"\w])(ray_\w+)\{", query)
        groups = re.findall(r'__name__=~"(ray_\w+)\.\*"', query)
        assert len(named) + len(groups) == 1 + query.count(" / ")
        # metrics of supervised stages are validated under the same names
        assert all(name in EXPORTED or name.replace("_validation_", "_train_") in EXPORTED for name in named), query
        assert all(any(name.startswith(group) for name in EXPORTED) for group in groups), query


def test_names_are_those_that_prometheus_allows_and_no_two_are_alike() -> None:
    assert all(re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) for name in EXPORTED)
    assert len(EXPORTED) == len(set(DOCUMENTED))


def test_panels_do_not_overlap() -> None:
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard()["panels"]}
    assert len(places) == len(dashboard()["panels"])
    assert all(x + 8 <= 24 for x, _ in places)
