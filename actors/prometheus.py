"""Metrics at Ray's Prometheus endpoint: the newest value of each, labelled with run and stage."""

import math

from ray.util.metrics import Gauge

from minigpt_ray.config import LoggingConfig
from minigpt_ray.tracking import Row, Sink, prometheus_name


def sinks(config: LoggingConfig, run: str, stage: str) -> list[Sink]:
    """What a tracker writes to besides its own files, if this is asked for."""
    return [Prometheus(run, stage)] if config.prometheus else []


class Prometheus:
    """A place where a tracker's metrics go. Ray exports them from the driver's process for as long as it lives."""

    def __init__(self, run: str, stage: str) -> None:
        self.tags = {"run": run, "stage": stage}
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Row) -> None:
        """The newest values; one that is not finite leaves the last in its place."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._gauge(name).set(float(value), tags=self.tags)

    def close(self, failed: bool) -> None:
        """Nothing to do: what is exported goes with the process."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(prometheus_name(name), description=f"{name}, see docs/metrics.md", tag_keys=tuple(self.tags))
        return self._gauges[name]
