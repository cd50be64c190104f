"""The optimizer and its learning rates."""

import torch

from ppo_ray.algo.schedule import learning_rate_factor
from ppo_ray.config import UpdateConfig
from ppo_ray.learner.sharding import Sharding
from ppo_ray.models.actor_critic import ActorCritic


def make_adam(policy: ActorCritic, sharding: Sharding, ppo: UpdateConfig) -> torch.optim.Adam:
    """Make the optimizer: torch's Adam with its defaults, a group for the policy and one for the values."""
    of_policy, of_values = map(sharding.trained, (policy.policy_parameters(), policy.value_parameters()))
    groups = [
        {"params": of_policy, "initial_lr": ppo.learning_rate},
        {"params": of_values, "initial_lr": ppo.value_learning_rate or ppo.learning_rate},
    ]
    return torch.optim.Adam(
        [group | {"lr": group["initial_lr"]} for group in groups], betas=(0.9, 0.999), eps=1e-8, fused=True
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, ppo: UpdateConfig, step: int, num_steps: int) -> None:
    """Set each group's learning rate to its own of that step of a run of `num_steps`."""
    factor = learning_rate_factor(
        step, num_steps, ppo.learning_rate_schedule, ppo.warmup_steps, ppo.learning_rate_final_factor
    )
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
