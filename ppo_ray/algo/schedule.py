"""The learning rate as a function of the step: nothing to save, nothing to step twice."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int, num_steps: int, schedule: Schedule = "constant", warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """Return what the learning rate is multiplied by in a step.

    It rises linearly over the first `warmup_steps` steps, (step + 1) / warmup_steps, and then, with
    t = (step - warmup_steps) / (num_steps - warmup_steps) and f = `final_factor`, it is
    1 (constant), 1 - (1 - f) t (linear) or f + (1 - f) (1 + cos(pi t)) / 2 (cosine).

    Args:
        step: from 0; a step beyond `num_steps` is taken as the last.
        num_steps: of the run.
        schedule: which.
        warmup_steps: 0: none.
        final_factor: what a linear or cosine schedule falls to.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - final_factor) * t
        case "cosine":
            return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * t)) / 2
    raise ValueError(f"schedule={schedule!r}; it must be constant, linear or cosine")
