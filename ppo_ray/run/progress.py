"""Progress over the steps: a bar on a terminal, a line per step in a log file."""

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ppo_ray.events import say

PARTS = {"generate": "time/generate_s", "score": "time/score_s", "learn": "time/learn_s", "sync": "time/sync_s"}
"""The parts of a step and the metric that has its seconds."""
STEP_SECONDS = "time/step_s"


class StepProgress:
    """A display of each step's number, mean score, KL and seconds by part."""

    def __init__(self, num_steps: int, console: Console, done: int = 0) -> None:
        """Show `num_steps` steps, `done` of them done, on a console: a bar on a terminal, else a line per step."""
        self._num_steps, self._console, self._done = num_steps, console, done
        self._started = time.monotonic()
        self._bar = _StepBar(console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=num_steps, completed=done) if self._bar else None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that a step (counted from 0) is done, and its metrics; what is missing among them is left out."""
        line = step_line(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.line = line
            self._bar.update(self._task, completed=step + 1, refresh=True)
            return
        left = (time.monotonic() - self._started) / (step + 1 - self._done) * (self._num_steps - step - 1)
        words = [f"step {step} ({step + 1}/{self._num_steps})", line, f"left {format_duration(left)}"]
        say(self._console, "  ".join(filter(None, words)))

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class _StepBar(Progress):
    """A bar, and below it a line of metrics."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("steps done"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.line = "first step under way"

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        # set in a subclass of Progress only after its first rendering
        yield Text(getattr(self, "line", ""), style="dim", no_wrap=True, overflow="ellipsis")


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
