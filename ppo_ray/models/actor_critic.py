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
    """Load the policy and its value head or critic; a value head that lies with the decoder it is for is taken.

    Where the policy computes in bfloat16, this is what its float32 master weights are made of.

    Raises:
        InputError: a model cannot be loaded or is not supported.
    """
    causal_lm = load_causal_lm(model.path, dtype=master_dtype(model), device=device, trust=model.trust)
    actor_critic: ActorCritic
    if model.critic == "separate":
        trained = Path(model.path) / CRITIC_FOLDER
        path = model.critic_path or (str(trained) if trained.is_dir() else model.path)
        critic = load_pretrained(AutoModel, path, dtype=master_dtype(model), device=device, trust=model.trust)
        actor_critic = CausalLMWithCritic(causal_lm, critic, temperature, value_head_seed)
    else:
        path = model.path
        actor_critic = CausalLMWithValueHead(causal_lm, temperature, value_head_seed=value_head_seed)
    actor_critic.load_values(Path(path))
    return actor_critic


def load_reference(model: ModelConfig, temperature: float, device: torch.device) -> ResponseLM:
    """Load the frozen reference, in the type it computes in: `model.reference_path`, or the policy as it starts.

    Raises:
        InputError: it cannot be loaded or is not supported.
    """
    path = model.reference_path or model.path
    causal_lm = load_causal_lm(path, dtype=master_dtype(model), device=device, trust=model.trust)
    reference = ResponseLM(causal_lm, temperature).requires_grad_(False)  # looked at in float32: rounding hides nothing
    for parameter in reference.parameters():
        cast(parameter, compute_dtype(model))
    return reference


def compute_dtype(model: ModelConfig) -> torch.dtype:
    """Return the type of the parameters that forward passes use."""
    return getattr(torch, model.dtype)


def master_dtype(model: ModelConfig) -> str:
    """Return what the optimizer steps: float32 even under bfloat16, whose steps of 1e-5 would be lost."""
    return "float32" if model.dtype == "bfloat16" else model.dtype


def cast(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Change a parameter's type in place. Buffers are left alone: rotary frequencies need float32."""
    parameter.data = parameter.data.to(dtype)
