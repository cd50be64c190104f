"""Losses as weighted sums over tokens: the weights, the value loss, and the correction of another policy's samples.

The weights of a mini-batch are known before its forward pass, are the same for all tokens of a sequence and add up to
one over all tokens. So a mini-batch may be split into micro-batches, and over ranks, in any way: the losses and
gradients of its parts add up to its own.

Dimensions: B sequences, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ppo_ray.algo.masked import check_tokens, weighted_sum

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "microbatch_mean"]


@dataclass(frozen=True)
class ValueLoss:
    """Value loss of a micro-batch, and diagnostics: weighted sums over its tokens. Only `loss` has a gradient."""

    loss: torch.Tensor
    """The clipped loss, the factor 1/2 included."""
    clipped: torch.Tensor
    """Share of tokens that the clipping holds back."""
    error: torch.Tensor
    """Sum of (value - return)^2."""
    value: torch.Tensor
    """Sum of the values."""


def token_weights(num_tokens: Sequence[int], aggregation: Aggregation, num_parts: int = 1) -> torch.Tensor:
    """Return the weight of each token of each sequence of a mini-batch; over all tokens the weights add up to one.

    - token_mean: 1 / N, with N the tokens of the mini-batch. All tokens count alike.
    - sequence_mean: 1 / (B * R_i). All sequences count alike, whatever their length.
    - sequence_sum: as token_mean; `loss_scale` is what differs.
    - microbatch_mean: 1 / (P * N_p), with N_p the tokens of the sequence's part. All parts count alike, so a token
      counts less among longer neighbours: TRL 0.11's mean of means under gradient accumulation.

    Args:
        num_tokens: `[B]`, response tokens of each sequence, at least 1, in the mini-batch's order.
        aggregation: one of the four.
        num_parts: P, equal runs of consecutive sequences; only microbatch_mean reads it.

    Returns:
        `[B]` float64.

    Raises:
        ValueError: there is no sequence, one without a token, or fewer sequences than parts.
    """
    tokens = torch.as_tensor(num_tokens, dtype=torch.float64)
    if not 1 <= num_parts <= len(tokens) or (tokens < 1).any():
        raise ValueError(f"{len(tokens)} sequences of {list(num_tokens)} tokens cannot be weighed in {num_parts} parts")
    match aggregation:
        case "token_mean" | "sequence_sum":
            return torch.full_like(tokens, 1 / float(tokens.sum()))
        case "sequence_mean":
            return 1 / (len(tokens) * tokens)
        case "microbatch_mean":
            parts = tokens.tensor_split(num_parts)
            return torch.cat([torch.full_like(part, 1 / (num_parts * float(part.sum()))) for part in parts])
    raise ValueError(
        f"aggregation={aggregation!r}; it must be token_mean, sequence_mean, sequence_sum or microbatch_mean"
    )


def loss_scale(num_tokens: Sequence[int], aggregation: Aggregation, length: int | None) -> float:
    """Return the factor of a mini-batch's loss, whose tokens weigh one together: 1, but for sequence_sum N / (B L).

    With it each token weighs 1 / (B L), whatever the length of its response, so long responses are no cheaper to get
    wrong. Liu et al. 2025 (Dr.GRPO, arXiv 2503.20783), sec. 3.2; L is a constant of the run. Figures stay means.

    Args:
        num_tokens: `[B]`, response tokens of each sequence of the mini-batch; N in all.
        aggregation: as in `token_weights`.
        length: L; only sequence_sum reads it.

    Raises:
        ValueError: sequence_sum has no length.
    """
    if aggregation != "sequence_sum":
        return 1.0
    if not length:
        raise ValueError(f"aggregation=sequence_sum needs a length of at least 1, not {length}")
    return float(sum(num_tokens)) / (len(num_tokens) * length)


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
