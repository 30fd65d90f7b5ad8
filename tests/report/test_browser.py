"""The pages in a real browser, where one is installed: they render, nothing is complained of, and no plot is empty."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minigpt_ray.report import Comparison, write_comparison, write_report
from minigpt_ray.report.drawing import COLORS
from tests.report.example import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Added to a copy of the page: what the browser has drawn of every figure, left in the document's title.
MEASURE = """
<script>
const figures = [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const colored = [...svg.querySelectorAll("path, use")].filter(mark => COLORS.some(color => (mark.getAttribute("style") || "").includes(color)));
  const visible = colored.filter(mark => { const b = mark.getBoundingClientRect(); return b.width + b.height > 1; });
  const inside = [...svg.querySelectorAll("text")].every(text => { const b = text.getBoundingClientRect(); return b.left >= box.left - 2 && b.right <= box.right + 2; });
  return {title: figure.querySelector("h4").textContent, width: box.width, height: box.height, marks: visible.length, inside: inside};
});
document.title = JSON.stringify(figures);
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    if BROWSER is None:
        pytest.skip("neither chromium nor google-chrome is installed, so the pages were not looked at in a browser")
    return BROWSER


def figures_of(browser: str, path: Path, profile: Path) -> list[dict]:
    """What the browser drew of each figure of a page; fails when it complains on its console."""
    measured = path.with_name("measured.html")
    measured.write_text(path.read_text().replace("</body>", MEASURE.replace("COLORS", json.dumps(COLORS)) + "</body>"))
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    options = ["--headless", *sandbox, "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}", "--window-size=1400,2000", "--dump-dom"]
    done = subprocess.run([browser, *options, measured.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(re.findall("<title>(.*?)</title>", done.stdout, re.DOTALL)[0].replace("&amp;", "&"))


@pytest.mark.slow
def test_the_report_renders_and_no_plot_is_empty(browser: str, tmp_path: Path) -> None:
    figures = figures_of(browser, write_report(write_run(tmp_path / "demo")), tmp_path / "profile")
    assert {"Reward", "Held-out exact match", "Loss", "Where the time goes", "Timeline of a step"} <= {figure["title"] for figure in figures}
    assert [f for f in figures if f["width"] < 300 or f["height"] < 100 or not f["marks"] or not f["inside"]] == []


@pytest.mark.slow
def test_a_comparison_renders_and_no_plot_is_empty(browser: str, tmp_path: Path) -> None:
    write_comparison(Comparison([write_run(tmp_path / name) for name in ("first", "second")]), tmp_path / "compare.html")
    figures = figures_of(browser, tmp_path / "compare.html", tmp_path / "profile")
    assert len(figures) >= 4 and [f for f in figures if f["width"] < 300 or f["height"] < 100 or not f["marks"] or not f["inside"]] == []
