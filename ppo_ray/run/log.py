"""The log of a run's metrics: one JSON object per step, and the same for TensorBoard."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from ppo_ray import atomic
from ppo_ray.events import ActorReport, Event

METRICS_FILE = "metrics.jsonl"
ACTORS_FILE = "actors.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_LONGEST_ACTORS = 64 << 20  # bytes that are read


def has_steps(folder: Path) -> bool:
    """Say whether a step was logged in a folder; events alone are none."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        return any('"event":' not in line for line in lines)


def read_steps(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of the steps that were logged in a folder, as `MetricsLog.go_on` returns them."""
    return [_figures(record) for _, record in _read_lines(folder / METRICS_FILE) if "event" not in record]


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Read what a folder's log has, whether or not a run is writing it.

    Returns:
        The metrics of each step, by step, with None for what was not finite; the events in order, each with `event`,
        `step`, `time`, `message` and `worker` where they are known; and how many whole lines are none of ours.
    """
    path = folder / METRICS_FILE
    lines = list(_read_lines(path))
    whole = path.read_bytes().count(b"\n") if path.is_file() else 0  # the line at the end may be being written
    steps = {record["step"]: record for _, record in lines if "event" not in record}
    events = [record for _, record in lines if "event" in record]
    return [steps[step] for step in sorted(steps)], events, max(whole - len(lines), 0)


def read_actors(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Read what each actor did in each step, as far as a folder's log has it, whether or not a run is writing it.

    Returns:
        By step, in order, and by the actor's name: `host`, where it is known, and figures by the metrics' names. Of a
        file that is larger than 64 MiB the steps before its last part are left out.
    """
    path = folder / ACTORS_FILE
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _LONGEST_ACTORS, 0))
        text = file.read(_LONGEST_ACTORS).decode(errors="replace")
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for _, record in _parse_lines(text):
        if isinstance(actors := record.get("actors"), dict):
            found[record["step"]] = {
                name: {key: value for key, value in figures.items() if key == "host" or _is_finite(value)}
                for name, figures in actors.items()
                if isinstance(figures, dict) and isinstance(figures.get("host"), str | None)
            }
    return dict(sorted(found.items()))


class MetricsLog:
    """A log into `metrics.jsonl` and `tensorboard/` of a folder; neither exists before the first step or event.

    What single actors did goes into `actors.jsonl` beside them.

    A line is in the file as soon as `write` returns, so that a run can be followed and a killed one can be read. Lines
    of events have the key `event`, lines of steps have not.
    """

    def __init__(self, folder: Path) -> None:
        """Log into a folder that exists."""
        self._folder = folder
        self._lines: TextIO | None = None
        self._events: Any = None
        self._written = time.monotonic()
        self._next_step = 0

    def write(
        self, step: int, metrics: Mapping[str, float], actors: Mapping[str, ActorReport] | None = None
    ) -> dict[str, float]:
        """Log one step.

        Args:
            step: counted from 0.
            metrics: values by name, e.g. `score/mean`; one that is not finite is `null` in the JSON.
            actors: what each actor did, by its name; none: nothing is written of them.

        Returns:
            The metrics as they were given, with `step` before them and `time/step_s` behind them: seconds since the
            last call, or since the log was made.
        """
        from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
        from tensorboard.compat.proto.summary_pb2 import Summary

        lines, events = self._open()
        now = time.monotonic()
        metrics = {**{name: float(value) for name, value in metrics.items()}, "time/step_s": now - self._written}
        self._written, self._next_step = now, step + 1
        record = {"step": step, **metrics}
        if actors:
            self._write_actors(step, actors)
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        lines.write(json.dumps(finite, allow_nan=False) + "\n")
        lines.flush()
        os.fsync(lines.fileno())  # a checkpoint that is on the disk has no lines before it that are not
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        events.add_event(TensorBoardEvent(wall_time=time.time(), step=step, summary=Summary(value=values)))
        events.flush()
        return record

    def start_clock(self) -> None:
        """Count the seconds of the next step from now."""
        self._written = time.monotonic()

    def event(self, event: Event) -> None:
        """Log an event beside the steps: `event` (kind), `message`, `worker`, `step` (the next one), `time`."""
        lines, _ = self._open()
        record = {"event": event.kind, "step": self._next_step, "time": time.time(), **asdict(event)}
        del record["kind"]
        lines.write(json.dumps(record) + "\n")
        lines.flush()

    def resume(self, step: int) -> list[dict[str, float]]:
        """Prepare to go on at a step: drop the lines of this and later steps, and one that was cut off.

        Args:
            step: the next one to be written.

        Returns:
            The metrics of the steps before it, as `write` returned them; what was not finite is NaN.
        """
        self.close()
        path = self._folder / METRICS_FILE
        actors = self._folder / ACTORS_FILE
        if actors.is_file():
            known = _parse_lines(actors.read_text(encoding="utf-8", errors="replace"))
            atomic.write_text(actors, "".join(line + "\n" for line, record in known if record["step"] < step))
        history: list[dict[str, float]] = []
        kept: list[str] = []
        for line, record in _read_lines(path):
            if "event" not in record:
                if record["step"] >= step:
                    continue
                history.append(_figures(record))
            kept.append(line + "\n")
        if path.is_file():
            atomic.write_text(path, "".join(kept))
        self._next_step = step
        if step or history:
            from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
            from tensorboard.compat.proto.event_pb2 import SessionLog

            # TensorBoard drops its values of this step and later ones
            started = SessionLog(status=SessionLog.START)
            self._open()[1].add_event(TensorBoardEvent(wall_time=time.time(), step=step, session_log=started))
        return history

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if self._lines is not None:
            self._lines.close()
            self._events.close()
            self._lines = self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_actors(self, step: int, actors: Mapping[str, ActorReport]) -> None:
        """Add a line to `actors.jsonl`; it is there before the step's line of metrics."""
        rows = {
            name: {
                **({"host": report.host} if report.host else {}),
                **{key: float(f"{value:.5g}") for key, value in report.metrics.items() if math.isfinite(value)},
            }
            for name, report in actors.items()
        }
        with open(self._folder / ACTORS_FILE, "a", encoding="utf-8", opener=atomic.open_no_link) as lines:
            lines.write(json.dumps({"step": step, "actors": rows}) + "\n")

    def _open(self) -> tuple[TextIO, Any]:
        if self._lines is None:
            # tensorboard's own writer: torch.utils.tensorboard would bring torch into the driver
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            path = self._folder / METRICS_FILE
            self._lines = open(path, "a", encoding="utf-8", opener=atomic.open_no_link)  # noqa: SIM115 (see close)
            self._events = EventFileWriter(str(self._folder / TENSORBOARD_FOLDER))
        return self._lines, self._events


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of a file and what it holds, but for lines that are none of ours or were cut off."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line, record in _parse_lines(text):
        if "event" in record or all(isinstance(value, int | float | None) for value in record.values()):
            yield line, record


def _parse_lines(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line that is whole and has a step, and what it holds."""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the process was killed while it wrote
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figures(record: Mapping[str, float | None]) -> dict[str, float]:
    """Return a step's metrics with NaN for what was not finite."""
    return {name: math.nan if value is None else value for name, value in record.items()}
