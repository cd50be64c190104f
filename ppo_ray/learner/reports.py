"""Reports of the learner: records without torch tensors, which the driver reads without loading torch."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

Outcome = Literal["stepped", "ratio_exceeded", "early_stopped", "nonfinite"]

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean difference of log-probabilities, nats per token, by the coarser dtype of both; measured: 1e-5, 0.03."""


@dataclass(frozen=True)
class MinibatchReport:
    """The result of one mini-batch."""

    metrics: dict[str, float]
    """Means over response tokens, weighted as the loss is (`ppo.loss_aggregation`), by their final names."""
    ratio_min: float
    ratio_max: float
    ratios: np.ndarray
    """`[tokens]` float32, the probability ratio of every response token of this rank, in no particular order."""
    last_part_kl: float
    """`policy/kl` of the last of the mini-batch's equal parts (`ppo.gradient_accumulation`) alone."""
    grad_norm: float = math.nan
    """Global L2 norm before clipping; NaN if the step was ruled out before the norm was computed."""
    outcome: Outcome = "stepped"


@dataclass(frozen=True)
class UpdateReport:
    """The result of one PPO update."""

    step: int
    """The step whose trajectories were learned from."""
    metrics: dict[str, float]
    """By the names in docs/diagnostics.md; of all ranks together."""
    kl_coef: float
    """Weight of the KL penalty in the next update."""
    trajectories: pa.Table | None = None
    """Table of `trajectory.LEARNED_SCHEMA`, in the order given; None where the caller only wants metrics."""
    minibatches: tuple[MinibatchReport, ...] = ()
    """Every mini-batch in order, those without an optimizer step included."""


@dataclass(frozen=True)
class Agreement:
    """Mean absolute differences between an engine's and the learner's log-probabilities of sampled tokens, in nats."""

    worker: str
    """The rollout worker whose engine it is."""
    to_moved: float
    """Between the engine and the learner under the moved weights, which the engine was sent."""
    to_own: float
    """Between the engine and the learner under its own weights."""
    move: float
    """Between the learner under the two sets of weights: how much there was to see."""

    def problem(self, dtype: str) -> str | None:
        """Say what is wrong with the engine; None if it computes with the weights it was sent.

        Args:
            dtype: the coarser of the engine's and the learner's, `"float32"` or `"bfloat16"`.
        """
        tolerance = _TOLERANCE[dtype]
        seen = f"{self.to_moved:.1e} nats a token off the learner with the weights it was sent"
        if math.isnan(self.to_moved) or self.to_moved > tolerance:
            before = "; it still computes with those before" if self.to_own <= tolerance else ""
            return f"{self.worker} is {seen} (at most {tolerance:g} in {dtype}){before}"
        if self.to_own < 5 * self.to_moved:
            return f"{self.worker} is {seen} and {self.to_own:.1e} off with the ones before: it cannot be told"
        return None


class Stopwatch:
    """Seconds of consecutive laps."""

    def __init__(self) -> None:
        """Start."""
        self._began = time.perf_counter()

    def lap(self, name: str) -> dict[str, float]:
        """End a lap and begin the next; returns the ended one's seconds under a metric's name."""
        began, self._began = self._began, time.perf_counter()
        return {name: self._began - began}
