"""PPO experience: log-probabilities, values, KL, rewards, advantages and returns of a batch before its update.

Dimensions: B sequences, R response tokens.
"""

from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch

from ppo_ray.algo.advantages import Baseline, group_advantages, length_adaptive_lambda, rewards_to_go, sum_rewards
from ppo_ray.algo.kl import kl_estimate
from ppo_ray.algo.losses import truncated_importance
from ppo_ray.algo.masked import masked_mean, masked_sum, masked_var, masked_whiten, whiten_zero
from ppo_ray.algo.rewards import (
    RunningMoments,
    clip_scores,
    gae,
    padding_advantages,
    penalise_missing_eos,
    scale_scores,
    token_rewards,
)
from ppo_ray.config import UpdateConfig
from ppo_ray.learner.batch import Layout, ResponseBatch
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM, ResponseOutput, unflatten


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of policy and reference for a batch; all `[B, R]`, zero outside the response mask."""

    old_logprobs: torch.Tensor
    """Log-probabilities by the policy before the update."""
    ref_logprobs: torch.Tensor
    """Log-probabilities by the frozen reference."""
    values: torch.Tensor | None
    """Values of the prefix before each token, before the update; None: there is no value function."""
    kl: torch.Tensor
    """Estimate of the KL between policy and reference per token, by `ppo.kl_estimator`."""


@dataclass(frozen=True)
class Experience(ModelOutputs):
    """The input of the update; all `[B, R]` and zero outside the response mask, except `scores`."""

    scores: torch.Tensor
    """`[B]`, after scaling, clipping and the penalty for a missing end of sequence."""
    rewards: torch.Tensor
    """Rewards per token: minus the KL penalty, plus the score on the last token; clipped, not whitened."""
    advantages: torch.Tensor
    """Advantages by `ppo.advantages`; whitened with `ppo.whiten_advantages`."""
    returns: torch.Tensor | None
    """What values learn: advantages before whitening, by `ppo.gae_lambda_value`, plus values; None: as `values`."""
    importance: torch.Tensor | None
    """Truncated importance weight of each token in the policy loss; None: every token has weight 1."""


@dataclass(frozen=True)
class Forward:
    """A forward pass of the policy with its graph, for one backward pass."""

    rows: PackedRows
    output: ResponseOutput


def run_models(
    policy: ActorCritic,
    reference: ResponseLM,
    batch: ResponseBatch,
    layout: Layout,
    ppo: UpdateConfig,
    keep: bool = False,
) -> tuple[ModelOutputs, Forward | None]:
    """Run policy and reference over all sequences, each rank over its share; every rank returns all of them.

    Args:
        policy: as it is before the update.
        reference: frozen.
        batch: what they are run over.
        layout: how the sequences are laid out in passes.
        ppo: the algorithm.
        keep: whether to return the policy's forward pass too, for a backward pass; there must be only one pass.
    """
    mask = batch.response_mask.to(layout.device)
    head = policy.value_head
    exact = torch.promote_types(next(policy.causal_lm.parameters()).dtype, torch.float32)
    dtype = exact if head is None else head.weight.dtype
    outputs = torch.zeros(4 if ppo.has_values else 3, *mask.shape, dtype=dtype, device=layout.device)
    old_logprobs, ref_logprobs, kl, *values = outputs
    kept = None
    with torch.no_grad():  # what fsdp2 gathers in inference mode could not be trained on
        for rows in layout.passes(batch, np.arange(batch.num_sequences)):
            index = torch.from_numpy(rows.sequences).to(layout.device, non_blocking=True)
            columns = slice(rows.response_mask.shape[1])
            ref_output = reference(rows)  # first: what it needs on the way is not there beside the policy's graph
            with torch.set_grad_enabled(keep):
                output = policy(rows)
            kept = Forward(rows, output) if keep else None
            old_logprobs[index, columns] = output.logprobs
            ref_logprobs[index, columns] = ref_output.logprobs
            if ppo.has_values:
                values[0][index, columns] = output.values
            if ppo.kl_estimator == "full":
                kl[index, columns] = unflatten(policy.full_kl(output.states, reference, ref_output.states), rows)
    layout.ranks.sum([outputs])
    if ppo.kl_estimator != "full":
        kl = kl_estimate(old_logprobs, ref_logprobs, mask, ppo.kl_estimator, ppo.kl_clamp)
    return ModelOutputs(old_logprobs, ref_logprobs, values[0] if ppo.has_values else None, kl), kept


def estimate(
    outputs: ModelOutputs, batch: ResponseBatch, ppo: UpdateConfig, kl_coef: float, moments: RunningMoments
) -> Experience:
    """Compute scores, rewards, advantages and returns.

    Args:
        outputs: of policy and reference.
        batch: the same sequences, with their scores.
        ppo: the algorithm.
        kl_coef: weight of the KL penalty.
        moments: of all scores so far, these included.
    """
    values, kl = outputs.values, outputs.kl
    mask = batch.response_mask.to(kl.device)
    scores = batch.scores.to(kl.device, kl.dtype)
    if ppo.score_scaling != "none":
        scores = scale_scores(scores, moments, subtract_mean=ppo.score_scaling == "mean_std")
    if ppo.score_clip is not None:
        scores = clip_scores(scores, ppo.score_clip)
    if ppo.missing_eos_penalty is not None:
        scores = penalise_missing_eos(scores, batch.ended.to(kl.device), ppo.missing_eos_penalty)
    rewards = token_rewards(kl, scores, mask, kl_coef if ppo.kl_in == "reward" else 0.0, ppo.reward_clip)
    if values is None:
        advantages, returns = _compare(rewards, batch, ppo), None
    else:
        advantages, returns = _estimate_by_values(rewards, values, batch, ppo)
    if ppo.whiten_advantages and ppo.advantages in ("gae", "reinforce", "reinforce_baseline"):
        advantages = masked_whiten(advantages, mask)
    importance = None
    if ppo.importance_cap is not None:
        rollout_logprobs = batch.rollout_logprobs.to(kl.device, kl.dtype)
        importance = truncated_importance(outputs.old_logprobs, rollout_logprobs, mask, ppo.importance_cap)
    return Experience(
        outputs.old_logprobs,
        outputs.ref_logprobs,
        values,
        kl,
        scores=scores,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        importance=importance,
    )


def _estimate_by_values(
    rewards: torch.Tensor, values: torch.Tensor, batch: ResponseBatch, ppo: UpdateConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages by generalised advantage estimation, and the returns that values learn."""
    mask = batch.response_mask.to(rewards.device)
    whitened, beyond = rewards, None
    if ppo.whiten_rewards != "off":
        whitened = masked_whiten(rewards, mask, shift_mean=False)
    if ppo.whiten_rewards == "padded":
        num_padding = torch.from_numpy(batch.num_tokens.max() - batch.num_tokens).to(rewards.device)
        beyond = padding_advantages(whiten_zero(rewards, mask), num_padding, ppo.gamma, ppo.gae_lambda)
    gae_lambda: float | torch.Tensor = ppo.gae_lambda
    if ppo.gae_length_alpha is not None:
        gae_lambda = length_adaptive_lambda(mask.sum(1), ppo.gae_length_alpha)
    advantages, returns = gae(whitened, values, mask, ppo.gamma, gae_lambda, beyond)
    if ppo.gae_lambda_value is not None:
        _, returns = gae(whitened, values, mask, ppo.gamma, ppo.gae_lambda_value)
    return advantages, returns


def _compare(rewards: torch.Tensor, batch: ResponseBatch, ppo: UpdateConfig) -> torch.Tensor:
    """Return the advantages of an estimator without values."""
    mask = batch.response_mask.to(rewards.device)
    if ppo.advantages == "reinforce":
        return rewards_to_go(rewards, mask, ppo.gamma)
    groups = torch.from_numpy(batch.groups).to(rewards.device)
    baseline: Baseline = "dr_grpo"
    if ppo.advantages in get_args(Baseline):
        baseline = cast("Baseline", ppo.advantages)
    advantages = group_advantages(sum_rewards(rewards, mask), groups, baseline)
    return torch.where(mask, advantages[:, None], 0).to(rewards.dtype)


def summarize_experience(
    experience: Experience, batch: ResponseBatch, ppo: UpdateConfig, kl_coef: float
) -> dict[str, float]:
    """Summarise what is known before the update, over response tokens."""
    mask = batch.response_mask.to(experience.kl.device)
    kl_coef = kl_coef if ppo.kl_in == "reward" else 0.0
    log_weights = torch.where(mask, experience.old_logprobs - batch.rollout_logprobs.to(mask.device), 0)
    metrics = {
        "score/used_mean": experience.scores.mean(),
        "score/used_std": experience.scores.std() if batch.num_sequences > 1 else torch.zeros(()),
        "kl/per_sequence": masked_sum(experience.kl, mask) / batch.num_sequences,
        "kl/per_token": masked_mean(experience.kl, mask),
        "reward/kl_penalty_mean": -kl_coef * masked_mean(experience.kl, mask),
        "advantages/mean": masked_mean(experience.advantages, mask),
        "advantages/std": masked_var(experience.advantages, mask).sqrt(),
        "mismatch/logprob_mean": masked_mean(log_weights.abs(), mask),
        "mismatch/logprob_max": log_weights.abs().max(),
        "mismatch/kl": masked_mean(torch.expm1(log_weights) - log_weights, mask),
    }
    if experience.values is not None and experience.returns is not None:
        returns_var = masked_var(experience.returns, mask)
        residuals = torch.where(mask, experience.returns - experience.values, 0)
        metrics |= {
            "value/mean": masked_mean(experience.values, mask),
            "value/std": masked_var(experience.values, mask).sqrt(),
            "value/explained_variance_before": 1 - masked_var(residuals, mask) / returns_var.clamp(min=1e-12),
            "returns/mean": masked_mean(experience.returns, mask),
            "returns/std": returns_var.sqrt(),
        }
    if experience.importance is not None and ppo.importance_cap is not None:
        capped = (experience.importance >= ppo.importance_cap).to(log_weights.dtype)
        metrics |= {
            "mismatch/importance_mean": masked_mean(experience.importance, mask),
            "mismatch/capped_fraction": masked_mean(capped, mask),
        }
    return {name: float(metric) for name, metric in metrics.items()}
