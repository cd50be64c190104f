"""The trainer's backends: their interface, the trajectories that they learn from, and the backend of this process.

Dimensions: P prompt tokens, R response tokens.
"""

import contextlib
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.models.actor_critic import CausalLMWithValueHead, UnadaptedPolicy
from ppo_ray.models.lora import without_adapters
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.trl.config import PPOConfig
from ppo_ray.trl.generation import GenerateCall, generate
from ppo_ray.trl.limits import Limits, TokenIds
from ppo_ray.trl.modeling import AutoModelForCausalLMWithValueHead

_MICROBATCH_TOKENS = 2048


class Backend(Protocol):
    """Generates and learns for a trainer."""

    kl_coef: float
    """Weight of the KL penalty in the next update; may be set."""

    def generate(self, call: GenerateCall, by_reference: bool = False) -> TokenIds:
        """Answer prompts with the policy or with the reference; see `PPOTrainer.generate`."""
        ...

    def update(self, table: pa.Table, orders: list[np.ndarray], temperature: float) -> UpdateReport:
        """Make one update on trajectories sampled at a temperature, rows in the given order in each epoch."""
        ...

    def close(self) -> None:
        """Free what it holds beyond the caller's models."""
        ...


class InProcess:
    """The backend that works in this process, on the caller's own models and optimizer."""

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: AutoModelForCausalLMWithValueHead | None,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Make a learner of models that are on their device, in eval mode."""
        self._model, self._ref_model, self._tokenizer = model, ref_model, tokenizer
        self._policy = CausalLMWithValueHead(model.pretrained_model, temperature=1.0, value_head=model.v_head.summary)
        self._policy.adapted = model.is_peft_model
        self._reference = (
            ResponseLM(ref_model.pretrained_model, temperature=1.0) if ref_model else UnadaptedPolicy(self._policy)
        )
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

    def generate(self, call: GenerateCall, by_reference: bool = False) -> TokenIds:
        """Sample by transformers' `generate`, dropout off."""
        model = (by_reference and self._ref_model) or self._model
        model.eval()
        unadapted = by_reference and self._ref_model is None
        with without_adapters(model) if unadapted else contextlib.nullcontext():
            return generate(model, self._tokenizer, call)

    def update(self, table: pa.Table, orders: list[np.ndarray], temperature: float) -> UpdateReport:
        """Make one update; the model is in eval mode after it as before."""
        self._model.eval()
        self._policy.temperature = self._reference.temperature = temperature
        return self._learner.update(table, self._learner.policy_version, orders.__getitem__)

    def close(self) -> None:
        """Do nothing: nothing is held."""


def build_trajectories(
    queries: list[torch.Tensor],
    responses: list[torch.Tensor],
    scores: list[torch.Tensor],
    response_masks: list[torch.Tensor] | None,
    batch_size: int,
    ends: Collection[int],
    limits: Limits,
) -> pa.Table:
    """Check what a script gives to `step`, and build a table of `trajectory.SCHEMA` from it.

    The rollout log-probabilities are NaN: they are unknown.

    Args:
        queries: `[P]` token ids each.
        responses: `[R]` token ids each.
        scores: one number each.
        response_masks: None, or all ones.
        batch_size: how many of each there must be.
        ends: token ids; a response that ends with one of them ended by itself.
        limits: of the model.

    Raises:
        ValueError: something is not as said, and the message names the sample; or there is one response token in all.
    """
    for name, tensors in (("queries", queries), ("responses", responses), ("scores", scores)):
        if not isinstance(tensors, list) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise ValueError(f"{name} must be a list of tensors")
        if len(tensors) != batch_size:
            raise ValueError(f"{name} has {len(tensors)} tensors, but batch_size={batch_size}")
    numbers = []
    for index, score in enumerate(scores):
        if score.dim() > 1 or score.numel() != 1:
            raise ValueError(f"scores[{index}] has shape {tuple(score.shape)}; it must be one number")
        if not torch.isfinite(score).all():
            raise ValueError(f"scores[{index}] is {float(score)}; a score must be finite")
        numbers.append(float(score))
    if response_masks is not None and not all(bool(mask.all()) for mask in response_masks):
        raise ValueError("response_masks cannot be honoured: every token of a response is learnt from; leave them out")
    rows = [
        _make_row(index, query, response, ends, limits)
        for index, (query, response) in enumerate(zip(queries, responses, strict=True))
    ]
    if sum(len(row["response_ids"]) for row in rows) < 2:
        raise ValueError(
            f"batch_size={batch_size} and responses[0] has one token: advantages are whitened over the response tokens "
            "of a step, which takes at least two of them; use a larger batch_size"
        )
    return trajectory.with_scores(trajectory.from_rows(rows), numbers)


def _make_row(
    index: int, query: torch.Tensor, response: torch.Tensor, ends: Collection[int], limits: Limits
) -> dict[str, Any]:
    """Make a row of the table; raises ValueError if the model cannot compute it, or it lacks tokens of either."""
    limits.check_ids(f"queries[{index}]", query)
    limits.check_ids(f"responses[{index}]", response)
    limits.check_length(f"queries[{index}] and responses[{index}]", len(query) + len(response))
    response_ids = response.tolist()
    return {
        "sample_id": index,
        "step": 0,
        "policy_version": 0,
        "worker": "trl",
        "seed": 0,
        "prompt": "",
        "response": "",
        "prompt_ids": query.tolist(),
        "response_ids": response_ids,
        "rollout_logprobs": [float("nan")] * len(response_ids),
        "finish_reason": "stop" if response_ids[-1] in ends else "length",
    }
