"""What happens in a run beside its steps: a worker replaced, a run resumed, a checkpoint found torn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["interrupted", "learner_rebuilt", "resumed", "torn_checkpoint", "worker_replaced"]


@dataclass(frozen=True)
class Event:
    """One such thing, for the log and for `metrics.jsonl`."""

    kind: Kind
    message: str
    """For people: who, what, why, how long it took."""
    worker: str | None = None
    """Whom it befell, e.g. `"rollout-1"`."""


Report = Callable[[Event], None]
"""What is told of every event as it happens."""
