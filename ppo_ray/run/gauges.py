"""The metrics of a run for Prometheus: on the metrics page of the driver's Ray node, beside Ray's own."""

import logging
import re
from collections import Counter
from collections.abc import Mapping

import ray
from ray.util import metrics as ray_metrics

from ppo_ray.events import Event

EVENTS = "ppo_ray_events"
"""The counter of events, by the tag `kind`."""

_LOG = logging.getLogger(__name__)


def gauge_name(metric: str) -> str:
    """Return the gauge of a metric: `score/mean` is `ppo_ray_score_mean`, and on the page `ray_ppo_ray_score_mean`."""
    return "ppo_ray_" + re.sub(r"\W", "_", metric, flags=re.ASCII)


class Gauges:
    """Gauges of every metric of a step, and a counter of events, with the tag `run`.

    Ray 2.60 takes a gauge to the page within ten seconds and drops it there twenty seconds later, unless it is set
    again; values that are not finite are left out. So queries ask for the last value of a period:
    `last_over_time(...[15m])`. No failure here ends a run: if Ray refuses, it is logged, and no more is exported.
    """

    def __init__(self, run: str) -> None:
        """Take the run's name; Ray need not be connected yet."""
        self._tags = {"run": run.encode("ascii", "backslashreplace").decode()}  # Ray raises at any other letter
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._events: ray_metrics.Counter | None = None
        self._uncounted: Counter[str] = Counter()
        self._refused = False

    def set(self, metrics: Mapping[str, float]) -> None:
        """Show a step's metrics, by their names in `metrics.jsonl`."""
        self._export(metrics)

    def count(self, event: Event) -> None:
        """Count an event; one from before Ray is connected is counted as soon as it is."""
        self._uncounted[event.kind] += 1
        self._export({})

    def _export(self, metrics: Mapping[str, float]) -> None:
        if self._refused or not ray.is_initialized():
            return
        try:
            for metric, value in metrics.items():
                self._gauge(metric).set(float(value))
            while self._uncounted:
                kind, number = self._uncounted.popitem()
                self._counter().inc(number, {"kind": kind})
        except Exception as error:  # of any kind: no run ends for its dashboard
            self._refused = True
            _LOG.warning("no more figures for Prometheus: %s: %s", type(error).__name__, error)

    def _gauge(self, metric: str) -> ray_metrics.Gauge:
        if metric not in self._gauges:
            gauge = ray_metrics.Gauge(gauge_name(metric), f"{metric} of the last step; docs/diagnostics.md", ("run",))
            self._gauges[metric] = gauge.set_default_tags(self._tags)
        return self._gauges[metric]

    def _counter(self) -> ray_metrics.Counter:
        if self._events is None:
            counter = ray_metrics.Counter(EVENTS, "What happened beside steps; docs/reliability.md", ("run", "kind"))
            self._events = counter.set_default_tags(self._tags)
        return self._events
