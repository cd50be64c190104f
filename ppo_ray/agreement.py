"""Whether an engine computes what the learner computes from the same weights."""

import math
from dataclasses import dataclass

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean difference of log-probabilities, nats a token, by the coarser dtype of both; measured: 1e-5, 0.03."""


@dataclass(frozen=True)
class Agreement:
    """Mean absolute differences of log-probabilities of the tokens an engine sampled, nats a token."""

    worker: str
    to_moved: float
    """Of the engine and the learner under the moved weights."""
    to_own: float
    """Of the engine and the learner under its own weights."""
    move: float
    """Of the learner under the two: how much there was to see."""


def disagreement(agreement: Agreement, dtype: str) -> str | None:
    """Say what is wrong with an engine; None if it computes with what it was sent. `dtype`: the coarser of the two."""
    tolerance = TOLERANCE[dtype]
    seen = f"{agreement.to_moved:.1e} nats a token off the learner with the weights it was sent"
    if math.isnan(agreement.to_moved) or agreement.to_moved > tolerance:
        before = "; it still computes with those before" if agreement.to_own <= tolerance else ""
        return f"{agreement.worker} is {seen} (at most {tolerance:g} in {dtype}){before}"
    if agreement.to_own < 5 * agreement.to_moved:
        return f"{agreement.worker} is {seen} and {agreement.to_own:.1e} off with the ones before: it cannot be told"
    return None
