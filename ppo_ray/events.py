"""What a run tells beside its metrics: events (a worker replaced, a run resumed), actors, lines for its console."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

EventKind = Literal[
    "interrupted",
    "learner_rebuilt",
    "resumed",
    "torn_checkpoint",
    "tracker_failed",
    "unscored_step",
    "worker_replaced",
]


@dataclass(frozen=True)
class Event:
    """One event, for the log and for `metrics.jsonl`."""

    kind: EventKind
    message: str
    """For people: who, what, why, how long it took."""
    worker: str | None = None
    """The worker that it happened to, e.g. `"rollout-1"`."""


@dataclass(frozen=True)
class ActorReport:
    """What one actor did in a step."""

    host: str | None
    """Name of the machine that it ran on, as the machine knows itself; None: it has not told yet."""
    metrics: Mapping[str, float]
    """Its own seconds (`time/...`) and memory (`memory/...`), by the names of docs/diagnostics.md."""


Report = Callable[[Event], None]
"""Is called with each event as it happens."""


def escape_controls(text: str) -> str:
    """Escape what could move a terminal's cursor or change its state; ends of lines and tabs stay.

    A message may quote a file's column, a label, a path or a model's output.
    """
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def say(console: "Console", text: str) -> None:
    """Print text as it is: without markup, colours or controls of its own, without line breaks to fit the console."""
    console.print(escape_controls(text), markup=False, highlight=False, soft_wrap=True)
