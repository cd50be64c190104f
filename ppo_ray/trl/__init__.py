"""TRL 0.11's PPO API, kept alive: `generate`, `step(queries, responses, scores)`, `log_stats`. See `docs/trl.md`."""

from ppo_ray.trl.config import PPOConfig
from ppo_ray.trl.length_sampler import LengthSampler
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
