"""Progress over the steps: a view that changes on a terminal, a line per step in a log file."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ppo_ray.events import say

PARTS = {"generate": "time/generate_s", "score": "time/score_s", "learn": "time/learn_s", "sync": "time/sync_s"}
"""The parts of a step and the metric that has its seconds."""
STEP_SECONDS = "time/step_s"
_SPARKED = {"score": "score/mean", "KL": "kl/per_sequence"}
_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 400  # steps; a terminal is narrower


class StepProgress:
    """A display of each step's number, mean score, KL and seconds by part."""

    def __init__(self, num_steps: int, console: Console, done: int = 0) -> None:
        """Show `num_steps` steps, `done` of them done, on a console: a view on a terminal, else a line per step."""
        self._num_steps, self._console, self._done = num_steps, console, done
        self._started = time.monotonic()
        self._view = _StepView(console) if console.is_terminal else None
        self._task = self._view.add_task("", total=num_steps, completed=done) if self._view else None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that a step (counted from 0) is done, and its metrics; what is missing among them is left out."""
        line = step_line(metrics)
        if self._view is not None and self._task is not None:
            self._view.take(line, metrics)
            self._view.update(self._task, completed=step + 1, refresh=True)
            return
        left = (time.monotonic() - self._started) / (step + 1 - self._done) * (self._num_steps - step - 1)
        words = [f"step {step} ({step + 1}/{self._num_steps})", line, f"left {format_duration(left)}"]
        say(self._console, "  ".join(filter(None, words)))

    def show_history(self, history: Iterable[Mapping[str, float]]) -> None:
        """Take the metrics of the steps before, for the curves of the view."""
        if self._view is not None:
            for metrics in history:
                self._view.take(self._view.line, metrics)

    @contextlib.contextmanager
    def show_phase(self, doing: str) -> Iterator[None]:
        """Show what is under way in the block, e.g. `generating`, and for how long."""
        if self._view is None:
            yield
            return
        self._view.phase = (doing, time.monotonic())
        try:
            yield
        finally:
            self._view.phase = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._view is not None:
            self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.stop()


class _StepView(Progress):
    """A bar, and below it the phase, curves of score and KL, and a line of metrics.

    What is printed meanwhile, by workers too, stands above it.
    """

    def __init__(self, console: Console) -> None:
        self.line = "first step under way"
        self.phase: tuple[str, float] | None = None
        """What is under way, and since when."""
        self._curves: dict[str, deque[float]] = {name: deque(maxlen=_MOST_BARS) for name in _SPARKED}
        super().__init__(
            TextColumn("steps done"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            refresh_per_second=2,  # the cores are the run's
        )

    def take(self, line: str, metrics: Mapping[str, float]) -> None:
        """Take a step's line and figures."""
        self.line = line
        for name, key in _SPARKED.items():
            if key in metrics:
                self._curves[name].append(metrics[key])

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for name, values in self._curves.items():
            if values:
                last = format_score(values[-1]) if name == "score" else f"{values[-1]:.2f}"
                width = max(self.console.width - 16, 1)
                yield Text(f"{name:<6}{last:>8}  {draw_spark(list(values)[-width:])}", no_wrap=True, overflow="crop")
        yield Text(self.line, style="dim", no_wrap=True, overflow="ellipsis")
        if phase := self.phase:
            doing, since = phase
            now = f"now: {doing}, {time.monotonic() - since:.0f} s"
            yield Text(now, style="dim", no_wrap=True, overflow="ellipsis")


def draw_spark(values: Iterable[float]) -> str:
    """Draw values as a line of bars from the lowest to the highest; what is not finite is a space."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def step_line(metrics: Mapping[str, float]) -> str:
    """Write a step's metrics on one line, e.g. `score +0.52  KL 1.04  9.3 s: generate 3.1, learn 5.0`."""
    words = []
    if "score/mean" in metrics:
        words.append(f"score {format_score(metrics['score/mean'])}")
    if "kl/per_sequence" in metrics:
        words.append(f"KL {metrics['kl/per_sequence']:.2f}")
    parts = ", ".join(f"{name} {metrics[key]:.1f}" for name, key in PARTS.items() if key in metrics)
    if STEP_SECONDS in metrics:
        words.append(f"{metrics[STEP_SECONDS]:.1f} s" + (f": {parts}" if parts else ""))
    elif parts:
        words.append(f"seconds: {parts}")
    return "  ".join(words)


def format_score(score: float | None) -> str:
    """Write a score with its sign and two decimals; none where there is no number."""
    return "none" if score is None or math.isnan(score) else f"{score:+.2f}"


def format_duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds, e.g. `0:07:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
