"""One run as the page shows it: what its files said last, and what a request asks of them."""

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_ray.errors import InputError
from ppo_ray.run.health import Range
from ppo_ray.run.log import read_actors
from ppo_ray.run.record import RunRecord
from ppo_ray.view.index import CHOICES, NUMBERS, Query, TrajectoryIndex
from ppo_ray.view.sample import Spreads, TokenTexts

LONGEST_PAGE = 500
"""Rows that an answer has at most."""
_MOST_STEPS = 400  # that a curve of an actor has


class View:
    """One run that is shown: what was read of it, and what is read again when its files change."""

    def __init__(self, path: Path) -> None:
        """Read the run's record; its trajectories are read when they are asked for.

        Raises:
            InputError: there is no run in the folder.
        """
        self._record = RunRecord.read(path)
        self._stamp: Any = None
        self._lock = threading.Lock()
        self.folder = folder = self._record.folder
        self.index = TrajectoryIndex(folder)
        self.spreads = Spreads(folder)
        model = self._record.options.get("model.path")
        self._actors: tuple[Any, dict[int, dict[str, dict[str, Any]]]] = None, {}
        self.texts = TokenTexts(folder.path, model if isinstance(model, str) else None)

    @property
    def record(self) -> RunRecord:
        """What the folder holds now."""
        folder = self._record.folder
        stamp = [_stamp(path) for path in (folder.metrics, folder.config, folder.before, folder.after)]
        with self._lock:
            if stamp != self._stamp:
                self._record, self._stamp = RunRecord.read(folder.path), stamp
            return self._record

    @property
    def actors(self) -> dict[int, dict[str, dict[str, Any]]]:
        """What each actor did in each step; see `read_actors`."""
        stamp = _stamp(self.folder.actors)
        with self._lock:
            if stamp != self._actors[0]:
                known = read_actors(self.folder.path) if self.folder.holds(self.folder.actors) else {}
                self._actors = stamp, known
            return self._actors[1]

    def trace_memory(self) -> dict[str, Any]:
        """Return each actor's memory over the steps, of at most `_MOST_STEPS` of them.

        Returns:
            `steps`, and `actors`: by name, a list over these steps per metric, None where it is not known.
        """
        known = self.actors
        steps = list(known)[:: math.ceil(len(known) / _MOST_STEPS) or 1]
        series: dict[str, dict[str, list[float | None]]] = {}
        for place, step in enumerate(steps):
            for actor, figures in known[step].items():
                for name in (name for name in figures if name.startswith("memory/")):
                    values = series.setdefault(actor, {}).setdefault(name, [None] * len(steps))
                    values[place] = figures[name]
        return {"steps": steps, "actors": dict(sorted(series.items()))}

    def summarize(self) -> dict[str, Any]:
        """Return what heads the page of a run."""
        record = self.record
        written = _stamp(record.folder.metrics)
        return {
            "name": record.folder.path.name,
            "folder": str(record.folder.path),
            "facts": record.describe(),
            "num_steps": len(record.steps),
            "num_planned": record.num_planned,
            "seconds_since": max(time.time() - written[0] / 1e9, 0) if written else None,
            "last_event": record.events[-1]["event"] if record.events else None,
            "notes": [*record.notes, *(f"{name} is left out: {why}" for name, why in self.index.skipped.items())],
        }

    def measure(self) -> dict[str, Any]:
        """Return every metric as a list over the steps, and all that is drawn with them."""
        record = self.record
        names = dict.fromkeys(name for metrics in record.steps for name in metrics)
        return {
            **self.summarize(),
            "metrics": {name: [metrics.get(name) for metrics in record.steps] for name in names},
            "batch_size": record.options.get("rollout.batch_size"),
            "events": list(record.events),
            "unhealthy": record.find_unhealthy(),
            "healthy": {name: _write_range(limits) for name, limits in record.health.ranges.items()},
            "held_out": [{"step": step, **figures} for step, figures in record.find_held_out()],
            "evaluations": {"before": record.before, "after": record.after},
            "changes": [vars(option) for option in record.find_changes()],
            "options": dict(record.options),
        }


def _write_range(limits: Range) -> dict[str, Any]:
    low, high = (limit if math.isfinite(limit) else None for limit in (limits.low, limits.high))
    return {"low": low, "high": high, "text": str(limits), "remedy": limits.remedy}


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def read_query(given: Mapping[str, str]) -> Query:
    """Read what a request asks for: `min.NAME`, `max.NAME`, `NAME` of a choice, `text`, `in`, `pattern`, `sort`."""
    ranges: dict[str, tuple[float | None, float | None]] = {}
    try:
        for key, value in given.items():
            bound, _, name = key.partition(".")
            if bound in ("min", "max") and (name in NUMBERS or name.startswith("parts.")):
                low, high = ranges.get(name, (None, None))
                limit = float(value)
                ranges[name] = (limit, high) if bound == "min" else (low, limit)
        offset, limit_ = int(given.get("offset", 0)), int(given.get("limit", 50))
    except ValueError as error:
        raise InputError(f"not a number: {error}") from error
    return Query(
        ranges=ranges,
        choices={name: given[name] for name in CHOICES if given.get(name)},
        text=given.get("text", ""),
        text_column=given.get("in", "response"),
        is_pattern=given.get("pattern") == "1",
        sort=given.get("sort", "step"),
        is_descending=given.get("order") == "desc",
        offset=max(offset, 0),
        limit=min(max(limit_, 1), LONGEST_PAGE),
    )
