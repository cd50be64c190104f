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
        """Write it as docs/diagnostics.md does, e.g. `0.9 to 1.1` or `at most 0.3`."""
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


_SMALLER = "lower ppo.learning_rate or ppo.epochs"
HEALTHY: Mapping[str, Range] = {
    "policy/approx_kl": Range(-math.inf, 0.05, _SMALLER),
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
"""Of a run whose policy has the loss clip, by the names of docs/diagnostics.md, which has more to say about each."""

_BY_LOSS: Mapping[str, Mapping[str, Range]] = {
    # the limits are those of a sequence's mean log-ratio, of the size of a thousandth: most sequences reach them within
    # an update (arXiv 2507.18071, sec. 5.2)
    "gspo": {
        "policy/clip_fraction": Range(-math.inf, 0.8, f"{_SMALLER}, or widen ppo.clip_range and ppo.clip_range_high"),
        "policy/ratio_min": Range(0.5, math.inf, f"{_SMALLER}, or set ppo.max_grad_norm=1"),
        "policy/ratio_max": Range(-math.inf, 2, f"{_SMALLER}, or set ppo.max_grad_norm=1"),
    },
}
"""The ranges of other losses, where they are others than those of clip."""
_NOT_JUDGED = ("policy/ratio_", "policy/clip_fraction")
"""Figures that have no range with a loss of the user's own: it alone says how far ratios may go, and what it holds."""


def healthy_ranges(policy_loss: str) -> Mapping[str, Range]:
    """Return the healthy range of each figure that has one, by name.

    Args:
        policy_loss: `ppo.policy_loss` of the run.
    """
    if ":" in policy_loss:
        return {name: limits for name, limits in HEALTHY.items() if not name.startswith(_NOT_JUDGED)}
    return {**HEALTHY, **_BY_LOSS.get(policy_loss, {})}


class HealthCheck:
    """The judgement of a run's steps, by the ranges of its loss."""

    def __init__(self, policy_loss: str = "clip", value_warmup_steps: int = 0) -> None:
        """Take `ppo.policy_loss` and `ppo.value_warmup_steps` of the run."""
        self.ranges = healthy_ranges(policy_loss)
        """By the figures' names."""
        self._value_warmup_steps = value_warmup_steps

    def find_outside(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the names of a step's figures that lie outside their healthy ranges.

        Left out is what the step did not measure: figures of the policy's move where the value head alone learns
        (`ppo.value_warmup_steps`) or where there is one optimizer step, before which the policy stands still; and the
        mismatch where the engines sample with older weights (`rollout.max_staleness=1`).

        Args:
            metrics: of a step, with `step`; missing figures are left out.
        """
        left_out: list[str] = []
        in_warmup = metrics.get("step", math.inf) < self._value_warmup_steps
        if in_warmup or metrics.get("policy/optimizer_steps", math.inf) <= 1:
            left_out.append("policy/")
        if metrics.get("rollout/staleness_max", 0) > 0:
            left_out.append("mismatch/")
        watched = (name for name in self.ranges if name in metrics and not name.startswith(tuple(left_out)))
        return [name for name in watched if not self.ranges[name].holds(metrics[name])]

    def find_warnings(self, history: Sequence[Mapping[str, float]]) -> Iterator[str]:
        """Yield a line for each figure that left its range in the last step; none for one that left it shortly before.

        Args:
            history: metrics of each step so far, the last step's last.
        """
        *before, last = history
        known = {name for metrics in before[-_CALM:] for name in self.find_outside(metrics)}
        for name in self.find_outside(last):
            if name not in known:
                limits = self.ranges[name]
                yield (
                    f"warning: step {last['step']:.0f}: {name} is {last[name]:.3g}, its healthy range is {limits}; "
                    f"{limits.remedy} (docs/diagnostics.md)"
                )

    def describe(self, history: Sequence[Mapping[str, float]]) -> str:
        """Say in how many steps each figure lay outside its range, and how many steps were within all of them."""
        outside = [self.find_outside(metrics) for metrics in history]
        counts = {name: sum(name in names for names in outside) for name in self.ranges}
        within = f"{outside.count([])} of {len(history)} steps within all healthy ranges"
        found = [
            f"{name} outside its range ({self.ranges[name]}) in {count}" for name, count in counts.items() if count
        ]
        return "; ".join([within, *found])
