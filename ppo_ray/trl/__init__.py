"""TRL 0.11's PPO classes on ppo_ray's learner; `docs/trl.md` says what differs."""

from ppo_ray.trl.config import PPOConfig
from ppo_ray.trl.generation import LengthSampler
from ppo_ray.trl.modeling import AutoModelForCausalLMWithValueHead, create_reference_model
from ppo_ray.trl.trainer import PPOTrainer, set_seed

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
    "set_seed",
]
