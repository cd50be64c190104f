"""The models of a learner, loaded as the config says: the policy with what estimates its values, and the reference."""

from pathlib import Path

import torch
from transformers import AutoModel

from ppo_ray.config import ModelConfig
from ppo_ray.models.critic import CRITIC_FOLDER, CausalLMWithCritic
from ppo_ray.models.loading import load_causal_lm, load_pretrained
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.value_head import CausalLMWithValueHead

ActorCritic = CausalLMWithValueHead | CausalLMWithCritic


def load_actor_critic(
    model: ModelConfig, temperature: float, value_head_seed: int, device: torch.device
) -> ActorCritic:
    """Load the policy and its value head or critic; what a checkpoint holds of the latter is taken from it.

    Raises:
        InputError: a model cannot be loaded or is not supported.
    """
    causal_lm = load_causal_lm(model.path, dtype=storage_dtype(model), device=device, trust=model.trust)
    actor_critic: ActorCritic
    if model.critic == "separate":
        trained = Path(model.path) / CRITIC_FOLDER
        path = model.critic_path or (str(trained) if trained.is_dir() else model.path)
        critic = load_pretrained(AutoModel, path, dtype=storage_dtype(model), device=device, trust=model.trust)
        actor_critic = CausalLMWithCritic(causal_lm, critic, temperature, model.dtype, value_head_seed)
    else:
        actor_critic = CausalLMWithValueHead(causal_lm, temperature, model.dtype, value_head_seed=value_head_seed)
    actor_critic.load_values(Path(model.path))
    return actor_critic


def load_reference(model: ModelConfig, temperature: float, device: torch.device) -> ResponseLM:
    """Load the frozen reference: `model.reference_path`, or the policy as it starts.

    Raises:
        InputError: it cannot be loaded or is not supported.
    """
    path = model.reference_path or model.path
    causal_lm = load_causal_lm(path, dtype=storage_dtype(model), device=device, trust=model.trust)
    return ResponseLM(causal_lm, temperature, model.dtype).requires_grad_(False)


def storage_dtype(model: ModelConfig) -> str:
    """Return what parameters are kept in: float32 even under bfloat16, whose steps of 1e-5 would be lost."""
    return "float32" if model.dtype == "bfloat16" else model.dtype
