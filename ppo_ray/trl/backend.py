"""Where a trainer's work is done: what the trainer asks of it, and the one that does it in this process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from ppo_ray.learner.learner import PPOLearner, Update
from ppo_ray.models.actor_critic import CausalLMWithValueHead
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.trl.config import PPOConfig
from ppo_ray.trl.generation import generate_batched, generate_one
from ppo_ray.trl.modeling import AutoModelForCausalLMWithValueHead

_MICROBATCH_TOKENS = 2048

Answer = torch.Tensor | list[torch.Tensor]


class Backend(Protocol):
    """Generates and learns for a trainer."""

    kl_coef: float
    """Weight of the KL penalty in the next update; may be set."""

    def generate(
        self,
        queries: Answer,
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        by_reference: bool,
        arguments: dict[str, Any],
    ) -> Answer:
        """Answer one prompt, `[P]` to `[1, T]`, or a list of such; see `PPOTrainer.generate`."""
        ...

    def update(self, table: pa.Table, orders: list[np.ndarray], temperature: float) -> Update:
        """Make one update on trajectories sampled at a temperature, rows in the given order in each epoch."""
        ...

    def close(self) -> None:
        """Free what it holds beyond the caller's models."""
        ...


class InProcess:
    """Everything in this process, on the caller's own models and optimizer."""

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: AutoModelForCausalLMWithValueHead,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Work on models that are on their device, in eval mode."""
        self._model, self._ref_model, self._tokenizer = model, ref_model, tokenizer
        self._policy = CausalLMWithValueHead(model.pretrained_model, temperature=1.0, value_head=model.v_head.summary)
        self._reference = ResponseLM(ref_model.pretrained_model, temperature=1.0)
        self._learner = PPOLearner(
            self._policy,
            self._reference,
            config.to_ppo_ray(),
            microbatch_tokens=_MICROBATCH_TOKENS,
            optimizer=optimizer,
            seed=config.seed,
        )

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty in the next update."""
        return self._learner.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        self._learner.controller = replace(self._learner.controller, kl_coef=value)

    def generate(
        self,
        queries: Answer,
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        by_reference: bool,
        arguments: dict[str, Any],
    ) -> Answer:
        """Sample by transformers' `generate`, dropout off."""
        model = self._ref_model if by_reference else self._model
        model.eval()
        if isinstance(queries, list):
            return generate_batched(
                model, self._tokenizer, queries, length_sampler, batch_size, return_prompt, arguments
            )
        return generate_one(model, queries, length_sampler, return_prompt, arguments)

    def update(self, table: pa.Table, orders: list[np.ndarray], temperature: float) -> Update:
        """Make one update; the model is in eval mode after it as before."""
        self._model.eval()
        self._policy.temperature = self._reference.temperature = temperature
        return self._learner.update(table, self._learner.policy_version, orders.__getitem__)

    def close(self) -> None:
        """Nothing is held."""
