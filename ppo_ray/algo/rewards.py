"""Per-token rewards of a scored response."""

import torch

from ppo_ray.algo.shapes import check_prefix, check_tokens


def token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coef: float, clip: float | None = None
) -> torch.Tensor:
    """Penalise every token for its KL and pay the score on the last one: r_t = -kl_coef * kl_t + [t = last] * score.

    Ziegler et al. 2019, eq. 2; TRL 0.11's `compute_rewards`. The last token is the last that was sampled, the
    end-of-sequence token included.

    Args:
        kl: `[B, R]` floating point, the log-ratio estimate.
        scores: `[B]` of the same dtype, finite.
        mask: `[B, R]` bool; each row begins with its one or more response tokens.
        kl_coef: weight of the penalty; 0 where the KL is penalised in the loss instead.
        clip: holds each token's reward within -clip and clip; None: as it is.

    Returns:
        `[B, R]`, zero outside the mask.

    Raises:
        ValueError: a shape is wrong, a response is empty, or a score is not finite.
    """
    check_tokens(mask, kl=kl)
    check_prefix(mask)
    if scores.shape != mask.shape[:1] or scores.dtype != kl.dtype:
        raise ValueError(f"scores are {scores.dtype} {tuple(scores.shape)}, not {kl.dtype} {tuple(mask.shape[:1])}")
    if not scores.isfinite().all():
        raise ValueError("a score is not finite; leave trajectories without a score out of the batch")
    rewards = torch.where(mask, -kl_coef * kl, 0)
    rewards[torch.arange(len(scores), device=kl.device), mask.sum(1) - 1] += scores
    return rewards if clip is None else rewards.clamp(-clip, clip)
