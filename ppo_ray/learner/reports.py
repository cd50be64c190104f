"""Reports of the learner: records without torch tensors, which the driver reads without loading torch."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from ppo_ray.events import ActorReport

Outcome = Literal["stepped", "ratio_exceeded", "early_stopped", "nonfinite"]


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
    actors: Mapping[str, ActorReport] = field(default_factory=dict)
    """What each actor did for this step, by its name; empty where the caller is no driver."""


class Stopwatch:
    """Seconds of consecutive laps."""

    def __init__(self) -> None:
        """Start."""
        self._began = time.perf_counter()

    def lap(self, name: str) -> dict[str, float]:
        """End a lap and begin the next; returns the ended one's seconds under a metric's name."""
        began, self._began = self._began, time.perf_counter()
        return {name: self._began - began}
