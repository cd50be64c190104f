"""PPO's losses, as weighted sums over tokens.

The weights are the caller's (`aggregation.token_weights`) and add up to one over the mini-batch, so the losses and
gradients of its micro-batches add up to those of the mini-batch, however it is split.

Dimensions: B sequences, R response tokens.
"""

from dataclasses import dataclass

import torch

from ppo_ray.algo.masked import weighted_sum
from ppo_ray.algo.shapes import check_tokens


@dataclass(frozen=True)
class PolicyLoss:
    """The policy's part of a micro-batch. Only `loss` has a gradient; figures are weighted sums, as the loss is."""

    loss: torch.Tensor
    """The clipped surrogate's share."""
    ratio: torch.Tensor
    """`[B, R]`, exp(logprob - old_logprob), 1 outside the mask."""
    clipped: torch.Tensor
    """Share of tokens that the clipping holds back."""
    dual_clipped: torch.Tensor
    """Share of tokens whose loss the dual clip bounds."""
    approx_kl: torch.Tensor
    """Of (logprob - old_logprob)^2 / 2."""
    kl: torch.Tensor
    """Of old_logprob - logprob."""


@dataclass(frozen=True)
class ValueLoss:
    """The values' part of a micro-batch. Only `loss` has a gradient; figures are weighted sums, as the loss is."""

    loss: torch.Tensor
    """The clipped loss's share, the factor 1/2 included."""
    clipped: torch.Tensor
    """Share of tokens that the clipping holds back."""
    error: torch.Tensor
    """Of (value - return)^2."""
    value: torch.Tensor
    """Of the values."""


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    importance: torch.Tensor | None = None,
) -> PolicyLoss:
    """Compute PPO's clipped policy loss: sum_it w_i max(-A_it r_it, -A_it clip(r_it, 1 - eps, 1 + eps_high)).

    r_t = exp(logprob_t - old_logprob_t). Schulman et al. 2017 (arXiv 1707.06347), eq. 7; TRL 0.11's `loss`.

    Args:
        logprobs: `[B, R]` floating point, of the current policy, with gradient.
        old_logprobs: `[B, R]`, before the update.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        weights: `[B]`, of each token of a sequence.
        clip_range: eps.
        clip_range_high: eps_high; None: eps. A larger one lets unlikely tokens rise (DAPO, arXiv 2503.14476, sec. 3.1).
        dual_clip: c; where A_t < 0 the loss is at most -c A_t, so that a ratio that has run away cannot dominate (Ye et
            al. 2020, arXiv 1912.09729, eq. 5); None: no bound.
        log_ratio_clamp: holds the log-ratio within plus and minus this, against overflow; beyond it there is no
            gradient. None: as it is.
        importance: `[B, R]`, weights of the tokens for the distribution that they were drawn from; None: 1.
    """
    check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = torch.where(mask, advantages, 0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    held = log_ratio if log_ratio_clamp is None else log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = held.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(
        1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)
    )
    losses = torch.maximum(plain, clipped)
    bounded = torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(bounded, bound, losses)
    if importance is not None:
        check_tokens(mask, importance=importance)
        losses = losses * torch.where(mask, importance, 0)
    loss = weighted_sum(losses, mask, weights)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio=ratio.detach(),
            clipped=weighted_sum((clipped > plain).to(ratio.dtype), mask, weights),
            dual_clipped=weighted_sum(bounded.to(ratio.dtype), mask, weights),
            approx_kl=weighted_sum(0.5 * log_ratio.square(), mask, weights),
            kl=weighted_sum(-log_ratio, mask, weights),
        )


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    *,
    value_clip_range: float | None,
) -> ValueLoss:
    """Compute the clipped value loss: 1/2 sum_it w_i max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    OpenAI baselines' ppo2; TRL 0.11's `loss`.

    Args:
        values: `[B, R]` floating point, of the current value head, with gradient.
        old_values: `[B, R]`, before the update.
        returns: `[B, R]`.
        mask: `[B, R]` bool.
        weights: `[B]`, of each token of a sequence.
        value_clip_range: c; None: the plain squared error.
    """
    check_tokens(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    error = (values - returns).square()
    worst = held_error = error
    if value_clip_range is not None:
        held = torch.clamp(values, old_values - value_clip_range, old_values + value_clip_range)
        held_error = (held - returns).square()
        worst = torch.maximum(error, held_error)
    loss = 0.5 * weighted_sum(worst, mask, weights)
    with torch.no_grad():
        return ValueLoss(
            loss=loss,
            clipped=weighted_sum((held_error > error).to(values.dtype), mask, weights),
            error=weighted_sum(error, mask, weights),
            value=weighted_sum(values, mask, weights),
        )


def truncated_importance(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """Return min(p_learner / p_engine, cap) of each sampled token, with the weights before the update in both.

    Engines compute in other kernels, and often in lower precision, than the learner; weighing the policy loss by the
    ratio makes it right on average again, the cap bounds its variance. Espeholt et al. 2018 (IMPALA), eq. 1; Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        old_logprobs: `[B, R]` floating point, by the learner before the update.
        rollout_logprobs: `[B, R]` of the same dtype, by the engine when it sampled.
        mask: `[B, R]` bool.
        cap: above 0.

    Returns:
        `[B, R]`, zero outside the mask, without gradient.
    """
    check_tokens(mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    if not cap > 0:
        raise ValueError(f"cap={cap}; it must be above 0")
    ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0).detach().exp()
    return torch.where(mask, ratio.clamp(max=cap), 0)
