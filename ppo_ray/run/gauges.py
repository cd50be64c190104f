"""The figures of a run for Prometheus: on the metrics page of the driver's Ray node, beside Ray's own."""

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


def gauge_name(figure: str) -> str:
    """Return the gauge of a figure: `score/mean` is `ppo_ray_score_mean`, and on the page `ray_ppo_ray_score_mean`."""
    return "ppo_ray_" + re.sub(r"\W", "_", figure, flags=re.ASCII)


class Gauges:
    """Whatever a step reports as gauges, and what happens beside the steps as a counter, with the tag `run`.

    Ray 2.60 takes a gauge to the page within ten seconds and drops it there twenty seconds later, unless it is set
    again; what is not finite it leaves out. So queries ask for the last value of a while: `last_over_time(...[15m])`.
    Nothing of this ends a run: if Ray refuses, it is logged, and no more is exported.
    """

    def __init__(self, run: str) -> None:
        """Take the run's name; Ray need not be connected yet."""
        self._tags = {"run": run.encode("ascii", "backslashreplace").decode()}  # Ray raises at any other letter
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._events: ray_metrics.Counter | None = None
        self._uncounted: Counter[str] = Counter()
        self._refused = False

    def set(self, figures: Mapping[str, float]) -> None:
        """Show a step's figures, by their names in `metrics.jsonl`."""
        self._export(figures)

    def count(self, event: Event) -> None:
        """Count an event; one from before Ray is connected is counted as soon as it is."""
        self._uncounted[event.kind] += 1
        self._export({})

    def _export(self, figures: Mapping[str, float]) -> None:
        if self._refused or not ray.is_initialized():
            return
        try:
            for figure, value in figures.items():
                self._gauge(figure).set(float(value))
            while self._uncounted:
                kind, number = self._uncounted.popitem()
                self._counter().inc(number, {"kind": kind})
        except Exception as error:  # whatever it is: no run ends for its dashboard
            self._refused = True
            _LOG.warning("no more figures for Prometheus: %s: %s", type(error).__name__, error)

    def _gauge(self, figure: str) -> ray_metrics.Gauge:
        if figure not in self._gauges:
            gauge = ray_metrics.Gauge(gauge_name(figure), f"{figure} of the last step; docs/diagnostics.md", ("run",))
            self._gauges[figure] = gauge.set_default_tags(self._tags)
        return self._gauges[figure]

    def _counter(self) -> ray_metrics.Counter:
        if self._events is None:
            counter = ray_metrics.Counter(EVENTS, "What happened beside the steps; docs/faults.md", ("run", "kind"))
            self._events = counter.set_default_tags(self._tags)
        return self._events
