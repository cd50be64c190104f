"""The learner's models as they are loaded and laid out over its ranks."""

from dataclasses import dataclass

import torch

from ppo_ray.config import LearnerConfig, ModelConfig
from ppo_ray.learner.ranks import Ranks
from ppo_ray.learner.sharding import FullySharded, Replicated, Sharding
from ppo_ray.models.actor_critic import ActorCritic, compute_dtype, load_actor_critic, load_reference
from ppo_ray.models.layers import recompute_layers
from ppo_ray.models.response_lm import ResponseLM


@dataclass(frozen=True)
class LearnerModels:
    """What a learner works with."""

    policy: ActorCritic
    reference: ResponseLM
    sharding: Sharding


def load_models(
    model: ModelConfig,
    learner: LearnerConfig,
    temperature: float,
    value_head_seed: int,
    device: torch.device,
    ranks: Ranks,
    checkpoint: str | None = None,
) -> LearnerModels:
    """Load policy, values and reference onto a device; under `fsdp2` this rank's share of them.

    Args:
        model: which.
        learner: how they lie on the ranks.
        temperature: that responses are sampled at.
        value_head_seed: of the values' initial weights.
        device: where they go. Shares go there layer by layer: it never holds a whole model.
        ranks: the processes that share the update.
        checkpoint: where policy and values are taken from instead; the reference stays that of `model`.

    Raises:
        InputError: a model cannot be loaded or is not supported.
    """
    shared = learner.sharding == "fsdp2" and ranks.size > 1
    loaded_on = torch.device("cpu") if shared else device
    trained = model.model_copy(update={"path": checkpoint, "critic_path": None}) if checkpoint else model
    policy = load_actor_critic(trained, temperature, value_head_seed, loaded_on)
    reference = load_reference(model, temperature, loaded_on)
    if learner.gradient_checkpointing:
        recompute_layers(policy)
    if shared:
        return LearnerModels(policy, reference, FullySharded(policy, reference, ranks, compute_dtype(model), device))
    return LearnerModels(policy, reference, Replicated(policy, ranks, compute_dtype(model)))
