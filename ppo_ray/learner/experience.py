"""What is known of a batch before it is learnt from: what the models say of it, and what follows for each token.

Dimensions: B sequences, R response tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ppo_ray.algo.gae import gae, padding_advantages
from ppo_ray.algo.kl import kl_estimate
from ppo_ray.algo.losses import truncated_importance
from ppo_ray.algo.masked import masked_whiten, whiten_zero
from ppo_ray.algo.rewards import RunningMoments, clip_scores, penalise_missing_eos, scale_scores, token_rewards
from ppo_ray.config import PPOConfig
from ppo_ray.learner.batch import Layout, ResponseBatch
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM, ResponseOutput, unflatten


@dataclass(frozen=True)
class Evaluated:
    """What the models say of a batch; all `[B, R]`, zero outside the response mask."""

    old_logprobs: torch.Tensor
    """By the policy before the update."""
    ref_logprobs: torch.Tensor
    """By the frozen reference."""
    values: torch.Tensor
    """Of the prefix before each token, before the update."""
    kl: torch.Tensor
    """Of policy and reference, as `kl_estimator` says."""


@dataclass(frozen=True)
class Experience(Evaluated):
    """What a batch is learnt from; all `[B, R]`, zero outside the response mask, but for `scores`."""

    scores: torch.Tensor
    """`[B]`, scaled, clipped and less the penalty for a missing end."""
    rewards: torch.Tensor
    """KL penalty and, on the last token, the score; clipped, not whitened."""
    advantages: torch.Tensor
    """Whitened, if that is configured."""
    returns: torch.Tensor
    importance: torch.Tensor | None
    """Weights of the policy loss's tokens; None: not weighed."""


@dataclass(frozen=True)
class Forward:
    """A forward pass of the policy, of which a backward pass can still be made, once."""

    rows: PackedRows
    output: ResponseOutput


def evaluate(
    policy: ActorCritic,
    reference: ResponseLM,
    batch: ResponseBatch,
    layout: Layout,
    ppo: PPOConfig,
    keep: bool = False,
) -> tuple[Evaluated, Forward | None]:
    """Run policy and reference over all sequences, each rank over its share; every rank gets the whole.

    Args:
        policy: as it is before the update.
        reference: frozen.
        batch: what they are run over.
        layout: how.
        ppo: the algorithm.
        keep: whether to return the policy's forward pass too, for a backward pass; it must be the only one.
    """
    mask = batch.response_mask.to(layout.device)
    figures = torch.zeros(4, *mask.shape, dtype=policy.value_head.weight.dtype, device=layout.device)
    old_logprobs, ref_logprobs, values, kl = figures
    kept = None
    with torch.no_grad():  # what fsdp2 gathers in inference mode could not be trained on
        for rows in layout.passes(batch, np.arange(batch.num_sequences)):
            index = torch.from_numpy(rows.sequences).to(layout.device)
            columns = slice(rows.response_mask.shape[1])
            with torch.set_grad_enabled(keep):
                output = policy(rows)
            kept = Forward(rows, output) if keep else None
            ref_output = reference(rows)
            old_logprobs[index, columns] = output.logprobs
            ref_logprobs[index, columns] = ref_output.logprobs
            values[index, columns] = output.values
            if ppo.kl_estimator == "full":
                kl[index, columns] = unflatten(policy.full_kl(output.states, reference, ref_output.states), rows)
    layout.ranks.sum([figures])
    if ppo.kl_estimator != "full":
        kl = kl_estimate(old_logprobs, ref_logprobs, mask, ppo.kl_estimator)
    return Evaluated(old_logprobs, ref_logprobs, values, kl), kept


def estimate(
    evaluated: Evaluated, batch: ResponseBatch, ppo: PPOConfig, kl_coef: float, moments: RunningMoments
) -> Experience:
    """Work out scores, rewards, advantages and returns.

    Args:
        evaluated: what the models say.
        batch: whose scores and masks count.
        ppo: the algorithm.
        kl_coef: weight of the KL penalty.
        moments: of all scores so far, these included.
    """
    values, kl = evaluated.values, evaluated.kl
    mask = batch.response_mask.to(kl.device)
    scores = batch.scores.to(kl.device, kl.dtype)
    if ppo.score_scaling != "none":
        scores = scale_scores(scores, moments, subtract_mean=ppo.score_scaling == "mean_std")
    if ppo.score_clip is not None:
        scores = clip_scores(scores, ppo.score_clip)
    if ppo.missing_eos_penalty is not None:
        scores = penalise_missing_eos(scores, batch.ended.to(kl.device), ppo.missing_eos_penalty)
    rewards = token_rewards(kl, scores, mask, kl_coef if ppo.kl_in == "reward" else 0.0, ppo.reward_clip)
    whitened, beyond = rewards, None
    if ppo.whiten_rewards != "off":
        whitened = masked_whiten(rewards, mask, shift_mean=False)
    if ppo.whiten_rewards == "padded":
        num_padding = torch.from_numpy(batch.num_tokens.max() - batch.num_tokens).to(kl.device)
        beyond = padding_advantages(whiten_zero(rewards, mask), num_padding, ppo.gamma, ppo.gae_lambda)
    advantages, returns = gae(whitened, values, mask, ppo.gamma, ppo.gae_lambda, beyond)
    if ppo.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    importance = None
    if ppo.importance_cap is not None:
        rollout_logprobs = batch.rollout_logprobs.to(kl.device, kl.dtype)
        importance = truncated_importance(evaluated.old_logprobs, rollout_logprobs, mask, ppo.importance_cap)
    return Experience(
        evaluated.old_logprobs,
        evaluated.ref_logprobs,
        values,
        kl,
        scores=scores,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        importance=importance,
    )
