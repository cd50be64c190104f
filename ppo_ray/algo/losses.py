"""PPO's losses, as sums over tokens divided by an explicit number of tokens.

The denominator is the caller's: with the token count of the whole mini-batch, the losses and gradients of its
micro-batches add up to those of the mini-batch, however it is split.
"""

from dataclasses import dataclass

import torch

from ppo_ray.algo.masked import masked_sum
from ppo_ray.algo.shapes import check_tokens


@dataclass(frozen=True)
class PolicyLoss:
    """The policy's part of a micro-batch; all scalars. Only `loss` has a gradient; `*_sum` are over tokens."""

    loss: torch.Tensor
    """The clipped surrogate's share: sum over the micro-batch's tokens / num_tokens."""
    ratio_sum: torch.Tensor
    """Of exp(logprob - old_logprob)."""
    ratio_max: torch.Tensor
    """The largest ratio."""
    clipped_sum: torch.Tensor
    """How many tokens the clipping holds back."""
    approx_kl_sum: torch.Tensor
    """Of (logprob - old_logprob)^2 / 2."""
    kl_sum: torch.Tensor
    """Of old_logprob - logprob."""


@dataclass(frozen=True)
class ValueLoss:
    """The value head's part of a micro-batch; all scalars. Only `loss` has a gradient; `*_sum` are over tokens."""

    loss: torch.Tensor
    """The clipped loss's share: sum over the micro-batch's tokens / num_tokens, the factor 1/2 included."""
    clipped_sum: torch.Tensor
    """How many tokens the clipping holds back."""
    error_sum: torch.Tensor
    """Of (value - return)^2."""


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    num_tokens: int,
) -> PolicyLoss:
    """Compute PPO's clipped policy loss: sum_t max(-A_t r_t, -A_t clip(r_t, 1 - eps, 1 + eps)) / num_tokens.

    r_t = exp(logprob_t - old_logprob_t). Schulman et al. 2017 (arXiv 1707.06347), eq. 7; TRL 0.11's `loss`.

    Args:
        logprobs: `[B, R]` floating point, of the current policy, with gradient.
        old_logprobs: `[B, R]`, before the update.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        clip_range: eps.
        num_tokens: response tokens of the whole mini-batch.
    """
    check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _check_denominator(mask, num_tokens)
    advantages = torch.where(mask, advantages, 0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_sum(torch.maximum(plain, clipped), mask) / num_tokens
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio_sum=masked_sum(ratio, mask),
            ratio_max=torch.where(mask, ratio, 0).max(),
            clipped_sum=masked_sum((clipped > plain).to(ratio.dtype), mask),
            approx_kl_sum=masked_sum(0.5 * log_ratio.square(), mask),
            kl_sum=masked_sum(-log_ratio, mask),
        )


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    value_clip_range: float,
    num_tokens: int,
) -> ValueLoss:
    """Compute the clipped value loss: 1/2 sum_t max((V_t - R_t)^2, (clip(V_t, V_old_t -+ c) - R_t)^2) / num_tokens.

    OpenAI baselines' ppo2; TRL 0.11's `loss`.

    Args:
        values: `[B, R]` floating point, of the current value head, with gradient.
        old_values: `[B, R]`, before the update.
        returns: `[B, R]`.
        mask: `[B, R]` bool.
        value_clip_range: c.
        num_tokens: response tokens of the whole mini-batch.
    """
    check_tokens(mask, values=values, old_values=old_values, returns=returns)
    _check_denominator(mask, num_tokens)
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    held = torch.clamp(values, old_values - value_clip_range, old_values + value_clip_range)
    error, held_error = (values - returns).square(), (held - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(error, held_error), mask) / num_tokens
    with torch.no_grad():
        return ValueLoss(
            loss=loss,
            clipped_sum=masked_sum((held_error > error).to(values.dtype), mask),
            error_sum=masked_sum(error, mask),
        )


def _check_denominator(mask: torch.Tensor, num_tokens: int) -> None:
    here = int(mask.sum())
    if num_tokens < max(here, 1):
        raise ValueError(f"num_tokens={num_tokens}, but there are {here} tokens here; give the mini-batch's count")
