"""Truncated importance sampling: weights for tokens that an engine drew from a slightly other distribution."""

import torch

from ppo_ray.algo.shapes import check_tokens


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
