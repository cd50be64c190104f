"""What is compared, what is measured of it, and how it lies on disk between the runs and the report."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ppo_ray import atomic

ARMS = {
    "trl": "TRL, one prompt per call",
    "trl-batched": "TRL, batched",
    "ppo-ray": "ppo_ray",
    "ppo-ray-bf16": "ppo_ray, bfloat16",
}
"""By name: how each is called in tables."""

OURS, OURS_BFLOAT16 = "ppo-ray", "ppo-ray-bf16"

PHASES = {
    "generation": "generation",
    "scoring": "scoring",
    "forward": "forward passes",
    "update": "update",
    "sync": "weight sync",
    "other": "everything else",
}
"""A step's seconds, which add up to the step; `other` is what is no model's arithmetic: the overhead."""

FIGURES = {
    "score": "mean score",
    "kl": "KL per sequence, nats",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
}
"""What a step came to, by which the algorithms are compared."""


@dataclass(frozen=True)
class Step:
    """One step of one arm."""

    seconds: dict[str, float]
    """By phase, but for `other`."""
    total_s: float
    """All of it, by the wall clock."""
    lengths: list[tuple[int, int]]
    """Tokens of prompt and response, for each sample."""
    figures: dict[str, float]
    mismatch: float | None = None
    """KL between the engine's and the learner's log-probabilities, nats per token; TRL has one model for both."""

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of all phases; what is in no other is `other`."""
        return {**self.seconds, "other": self.total_s - sum(self.seconds.values())}


@dataclass(frozen=True)
class ArmRun:
    """All steps of an arm in one round."""

    arm: str
    seed: int
    steps: list[Step]
    peak_mib: float
    """Of all its processes together, pages that they share counted once."""
    peak_processes: dict[str, float]
    """What each process had of it, MiB."""

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        atomic.write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "steps": [step_from(fields) for fields in fields["steps"]]})


def step_from(fields: dict[str, Any]) -> Step:
    """Build a step from JSON."""
    lengths = [(prompt, response) for prompt, response in fields["lengths"]]
    return Step(fields["seconds"], fields["total_s"], lengths, fields["figures"], fields.get("mismatch"))
