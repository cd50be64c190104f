"""The healthy ranges of a step's figures, and words for what lies outside.

The ranges are measured on the tasks of configs/ and on a run at TRL's learning rate. docs/diagnostics.md shows them; a
test holds it to them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_CALM = 5
"""A figure is warned of again after so many steps within its range."""


@dataclass(frozen=True)
class Range:
    """The values of a figure that are healthy, the limits included."""

    low: float
    high: float
    remedy: str
    """What to change where a value lies outside."""

    def holds(self, value: float) -> bool:
        """Say whether a value lies within; NaN does not."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """Write it as docs/diagnostics.md does, e.g. `0.001 to 0.05` or `at most 0.3`."""
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


_SMALLER = "lower ppo.learning_rate or ppo.epochs"
HEALTHY: Mapping[str, Range] = {
    "policy/approx_kl": Range(0.001, 0.05, f"above it {_SMALLER}, below it raise them"),
    "policy/clip_fraction": Range(-math.inf, 0.3, _SMALLER),
    "policy/ratio_mean": Range(0.9, 1.1, _SMALLER),
    "policy/ratio_min": Range(0.01, math.inf, f"{_SMALLER}, or set ppo.max_grad_norm=1"),
    "policy/ratio_max": Range(-math.inf, 10, f"{_SMALLER}, or set ppo.max_grad_norm=1"),
    "policy/skipped_minibatches": Range(0, 0, _SMALLER),
    "policy/nonfinite_minibatches": Range(0, 0, "set ppo.max_grad_norm=1, or model.dtype=float32"),
    "kl/per_sequence": Range(-1, 20, "raise ppo.kl_coef, or lower ppo.learning_rate"),
    "value/clip_fraction": Range(-math.inf, 0.3, "raise ppo.value_clip_range, or scale scores"),
    "mismatch/kl": Range(-math.inf, 1e-3, "engine and learner do not compute the same policy: stop and find out why"),
    "score/num_unscored": Range(0, 0, "read the reward workers' logs"),
}
"""By the names of docs/diagnostics.md, which has more to say about each."""


def find_outside(metrics: Mapping[str, float], value_warmup_steps: int = 0) -> list[str]:
    """Return the names of a step's figures that lie outside their healthy ranges.

    Left out is what the step did not measure: figures of the policy's move where the value head alone learns
    (`ppo.value_warmup_steps`) or where there is one optimizer step, before which the policy stands still; and the
    mismatch where the engines sample with older weights (`rollout.max_staleness=1`).

    Args:
        metrics: of a step, with `step`; missing figures are left out.
        value_warmup_steps: of the run.
    """
    left_out: list[str] = []
    if metrics.get("step", math.inf) < value_warmup_steps or metrics.get("policy/optimizer_steps", math.inf) <= 1:
        left_out.append("policy/")
    if metrics.get("rollout/staleness_max", 0) > 0:
        left_out.append("mismatch/")
    watched = (name for name in HEALTHY if name in metrics and not name.startswith(tuple(left_out)))
    return [name for name in watched if not HEALTHY[name].holds(metrics[name])]


def find_warnings(history: Sequence[Mapping[str, float]], value_warmup_steps: int = 0) -> Iterator[str]:
    """Yield a line for each figure that left its range in the last step; none for one that left it shortly before.

    Args:
        history: metrics of each step so far, the last step's last.
        value_warmup_steps: of the run.
    """
    *before, last = history
    known = {name for metrics in before[-_CALM:] for name in find_outside(metrics, value_warmup_steps)}
    for name in find_outside(last, value_warmup_steps):
        if name not in known:
            yield (
                f"warning: step {last['step']:.0f}: {name} is {last[name]:.3g}, its healthy range is {HEALTHY[name]}; "
                f"{HEALTHY[name].remedy} (docs/diagnostics.md)"
            )


def describe_health(history: Sequence[Mapping[str, float]], value_warmup_steps: int = 0) -> str:
    """Say in how many steps each figure lay outside its range, and how many steps were within all of them."""
    outside = [find_outside(metrics, value_warmup_steps) for metrics in history]
    counts = {name: sum(name in names for names in outside) for name in HEALTHY}
    within = f"{outside.count([])} of {len(history)} steps within all healthy ranges"
    found = [f"{name} outside its range ({HEALTHY[name]}) in {count}" for name, count in counts.items() if count]
    return "; ".join([within, *found])
