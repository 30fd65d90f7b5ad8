"""A run directory, or several -> one self-contained HTML page: results, hints, curves, answers, where the time went, configuration.

    python -m jobs.report outputs/debug
    python -m jobs.compare outputs/demo outputs/demo-1

Every stage that wrote a metrics.jsonl gets a chapter; what a stage did not measure is left out. The pages need no network.
"""

from minigpt_ray.report.comparison import Comparison, write_comparison, write_curves
from minigpt_ray.report.page import write_report

__all__ = ["Comparison", "write_comparison", "write_curves", "write_report"]
