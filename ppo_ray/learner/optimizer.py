"""Adam for policy and values, and the schedule of its learning rates.

The learning rate is a function of the step alone: there is no scheduler with a state to save.
"""

import math
from typing import Literal

import torch

from ppo_ray.config import UpdateConfig
from ppo_ray.learner.sharding import Sharding
from ppo_ray.models.actor_critic import ActorCritic

Schedule = Literal["constant", "linear", "cosine"]


def make_adam(policy: ActorCritic, sharding: Sharding, ppo: UpdateConfig) -> torch.optim.Adam:
    """Make torch's Adam with its defaults and two parameter groups: the policy's and the values'."""
    groups = [
        {"params": sharding.optimized_parameters(policy.policy_parameters()), "initial_lr": ppo.learning_rate},
        {
            "params": sharding.optimized_parameters(policy.value_parameters()),
            "initial_lr": ppo.value_learning_rate or ppo.learning_rate,
        },
    ]
    return torch.optim.Adam(
        [group | {"lr": group["initial_lr"]} for group in groups], betas=(0.9, 0.999), eps=1e-8, fused=True
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, ppo: UpdateConfig, step: int, num_steps: int) -> None:
    """Set the learning rate of each group for a step of a run of `num_steps`."""
    factor = learning_rate_factor(
        step, num_steps, ppo.learning_rate_schedule, ppo.warmup_steps, ppo.learning_rate_final_factor
    )
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rate_factor(
    step: int, num_steps: int, schedule: Schedule = "constant", warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """Return the factor of the learning rate in a step.

    It rises linearly over the first `warmup_steps` steps, (step + 1) / warmup_steps, and then, with
    t = (step - warmup_steps) / (num_steps - warmup_steps) and f = `final_factor`, it is
    1 (constant), 1 - (1 - f) t (linear) or f + (1 - f) (1 + cos(pi t)) / 2 (cosine).

    Args:
        step: from 0; a step beyond `num_steps` counts as the last.
        num_steps: of the run.
        schedule: one of the three.
        warmup_steps: 0: no warm-up.
        final_factor: the factor at the end of a linear or cosine schedule.

    Raises:
        ValueError: there is no such schedule.
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
