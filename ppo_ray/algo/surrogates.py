"""The policy's losses, as weighted sums over tokens: PPO's clipped surrogate, GSPO's, CISPO's, or any per-token loss.

The weights are those of `losses`. A sequence is never split over micro-batches, so what a loss computes of a whole
sequence does not depend on the split either.

Dimensions: B sequences, R response tokens.
"""

from dataclasses import dataclass

import torch

from ppo_ray.algo.masked import check_tokens, weighted_sum


@dataclass(frozen=True)
class PolicyLoss:
    """Policy loss of a micro-batch, and diagnostics: weighted sums over its tokens. Only `loss` has a gradient."""

    loss: torch.Tensor
    """The surrogate."""
    ratio: torch.Tensor
    """`[B, R]`, not summed: exp(logprob - old_logprob), or the sequence's ratio with GSPO; 1 outside the mask."""
    clipped: torch.Tensor
    """Share of tokens that the clipping holds back."""
    dual_clipped: torch.Tensor
    """Share of tokens whose loss the dual clip bounds."""
    approx_kl: torch.Tensor
    """Sum of (logprob - old_logprob)^2 / 2."""
    kl: torch.Tensor
    """Sum of old_logprob - logprob."""


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
        dual_clip: c; where A_t < 0 the loss is at most -c A_t, so that a very large ratio cannot dominate (Ye et
            al. 2020, arXiv 1912.09729, eq. 5); None: no bound.
        log_ratio_clamp: holds the log-ratio within plus and minus this, against overflow; beyond it there is no
            gradient. None: as it is.
        importance: `[B, R]`, weights of the tokens for the distribution that they were drawn from; None: 1.
    """
    check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = torch.where(mask, advantages, 0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = _hold(log_ratio, log_ratio_clamp).exp()
    losses, clipped = _clip_losses(advantages, ratio, clip_range, clip_range_high)
    bounded = torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(bounded, bound, losses)
    return _sum_up(losses, log_ratio, ratio, mask, weights, importance, clipped, bounded)


def gspo_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    log_ratio_clamp: float | None = None,
) -> PolicyLoss:
    """Compute GSPO's loss, one ratio per sequence: sum_it w_i max(-A_it s_it, -A_it clip(s_it, 1-eps, 1+eps_high)).

    s_i = exp(mean_t (logprob_t - old_logprob_t)) is the ratio of the sequences, to the power of 1 / R_i; the token's
    s_it = sg(s_i) p_t / sg(p_t) has its value, and the gradient that each token's own advantage weighs (sg: without
    gradient). Zheng et al. 2025 (arXiv 2507.18071), eq. 5 to 7, 13 and 14.

    Args:
        logprobs: `[B, R]` floating point, of the current policy, with gradient.
        old_logprobs: `[B, R]`, before the update.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        weights: `[B]`, of each token of a sequence; the paper's are those of sequence_mean.
        clip_range: eps; the paper's is 3e-4: a mean of log-ratios is far smaller than one of them.
        clip_range_high: eps_high; None: eps. The paper's is 4e-4.
        log_ratio_clamp: as in `clipped_surrogate`, of the mean log-ratio.
    """
    check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = torch.where(mask, advantages, 0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    mean = log_ratio.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    held = torch.where(mask, mean + (log_ratio - log_ratio.detach()), 0)
    ratio = _hold(held, log_ratio_clamp).exp()
    losses, clipped = _clip_losses(advantages, ratio, clip_range, clip_range_high)
    return _sum_up(losses, log_ratio, ratio, mask, weights, clipped=clipped)


def cispo_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_range_high: float,
    log_ratio_clamp: float | None = None,
    importance: torch.Tensor | None = None,
) -> PolicyLoss:
    """Compute CISPO's loss: sum_it w_i -sg(min(r_it, 1 + eps_high)) A_it logprob_it (sg: without gradient).

    The ratio is a weight that is held from above, and no token loses its gradient. MiniMax 2025 (arXiv 2506.13585),
    eq. 4 and 5, which have no lower bound either.

    Args:
        logprobs: `[B, R]` floating point, of the current policy, with gradient.
        old_logprobs: `[B, R]`, before the update.
        advantages: `[B, R]`.
        mask: `[B, R]` bool.
        weights: `[B]`, of each token of a sequence; the paper's are those of token_mean.
        clip_range_high: eps_high.
        log_ratio_clamp: as in `clipped_surrogate`.
        importance: as in `clipped_surrogate`.
    """
    check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = _hold(log_ratio.detach(), log_ratio_clamp).exp()
    held = ratio > 1 + clip_range_high
    factor = torch.where(mask, advantages, 0) * ratio.clamp(max=1 + clip_range_high)
    losses = -factor * torch.where(mask, logprobs, 0)
    return _sum_up(losses, log_ratio, ratio, mask, weights, importance, held)


def custom_surrogate(
    losses: torch.Tensor,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    importance: torch.Tensor | None = None,
) -> PolicyLoss:
    """Sum any loss per token, `[B, R]` with gradient: sum_it w_i loss_it. Nothing is known of a clipping."""
    check_tokens(mask, losses=losses, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    return _sum_up(losses, log_ratio, log_ratio.exp(), mask, weights, importance)


def _hold(log_ratio: torch.Tensor, limit: float | None) -> torch.Tensor:
    return log_ratio if limit is None else log_ratio.clamp(-limit, limit)


def _clip_losses(
    advantages: torch.Tensor, ratio: torch.Tensor, clip_range: float, clip_range_high: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max(-A r, -A clip(r, 1 - eps, 1 + eps_high)) of each token, and whether the clip holds it back."""
    plain = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    return torch.maximum(plain, clipped), clipped > plain


def _sum_up(
    losses: torch.Tensor,
    log_ratio: torch.Tensor,
    ratio: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    importance: torch.Tensor | None = None,
    clipped: torch.Tensor | None = None,
    bounded: torch.Tensor | None = None,
) -> PolicyLoss:
    """Sum a loss per token and its figures; `clipped` and `bounded` say of each token whether it is, None: of none."""
    if importance is not None:
        check_tokens(mask, importance=importance)
        losses = losses * torch.where(mask, importance, 0)
    loss = weighted_sum(losses, mask, weights)
    none = torch.zeros_like(mask)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio=ratio.detach(),
            clipped=weighted_sum((none if clipped is None else clipped).to(ratio.dtype), mask, weights),
            dual_clipped=weighted_sum((none if bounded is None else bounded).to(ratio.dtype), mask, weights),
            approx_kl=weighted_sum(0.5 * log_ratio.square(), mask, weights),
            kl=weighted_sum(-log_ratio, mask, weights),
        )
