"""Rewards and advantages: from the scores of responses to per-token rewards, advantages and returns.

Dimensions: B sequences, R response tokens.
"""

import math
from dataclasses import dataclass

import torch

from ppo_ray.algo.masked import check_prefix, check_tokens


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


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of all scores seen so far (Chan et al. 1979's parallel update; TRL 0.11's RunningMoments)."""

    count: int = 0
    """Number of scores."""
    mean: float = 0.0
    """Mean of the scores."""
    var: float = 0.0
    """Population variance of the scores."""

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two scores."""
        return math.sqrt(self.var * self.count / (self.count - 1)) if self.count > 1 else 0.0

    def include(self, scores: torch.Tensor) -> "RunningMoments":
        """Return the moments with a batch of `[B]` finite scores added."""
        if scores.ndim != 1 or not scores.isfinite().all():
            raise ValueError(f"scores are {tuple(scores.shape)}, not [B], or not all finite")
        if not len(scores):
            return self
        batch = scores.double()
        delta, count = float(batch.mean()) - self.mean, self.count + len(scores)
        squares = self.var * self.count + float(batch.var(correction=0)) * len(scores)
        squares += delta**2 * self.count * len(scores) / count
        return RunningMoments(count, self.mean + delta * len(scores) / count, squares / count)


def scale_scores(scores: torch.Tensor, moments: RunningMoments, subtract_mean: bool = False) -> torch.Tensor:
    """Divide `[B]` scores by the running standard deviation: s / (std + eps), or (s - mean) / (std + eps).

    eps is the dtype's machine epsilon. TRL 0.11's `use_score_scaling` and `use_score_norm` (its 0.11.3 crashes in
    both). Where all scores so far are equal, their scale is unknown: they are not divided. TRL would divide by eps.
    """
    centred = scores - moments.mean if subtract_mean else scores
    return centred / (moments.std + torch.finfo(scores.dtype).eps) if moments.std else centred


def clip_scores(scores: torch.Tensor, limit: float) -> torch.Tensor:
    """Hold `[B]` scores within -limit and limit (TRL 0.11's `score_clip`)."""
    return scores.clamp(-limit, limit)


def penalise_missing_eos(scores: torch.Tensor, ended: torch.Tensor, penalty: float) -> torch.Tensor:
    """Subtract a penalty from the scores of responses that were cut off: s - penalty * [not ended].

    A fixed cost teaches the policy to come to an end (Stiennon et al. 2020's "EOS trick" in the form of TRL 0.12's
    `missing_eos_penalty`).

    Args:
        scores: `[B]` floating point.
        ended: `[B]` bool, whether the response ended by itself.
        penalty: in the score's unit, after scaling and clipping.
    """
    if ended.shape != scores.shape or ended.dtype != torch.bool:
        raise ValueError(f"ended is {ended.dtype} {tuple(ended.shape)}, not torch.bool {tuple(scores.shape)}")
    return torch.where(ended, scores, scores - penalty)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    gae_lambda: float | torch.Tensor,
    final_advantages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the advantages and returns of the tokens of each response.

    With V(s_R) = 0 after the end:
    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma * lambda * A_{t+1};  returns_t = A_t + V(s_t).
    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; TRL 0.11's `compute_advantages`. The recursion is summed by
    doubling (Hillis and Steele 1986): log2(R) rounds over whole tensors instead of R over columns.

    Args:
        rewards: `[B, R]` floating point.
        values: `[B, R]`, of the prefix before each token.
        mask: `[B, R]` bool; each row begins with its one or more response tokens.
        gamma: discount.
        gae_lambda: 0 trusts the value head, 1 the sampled rewards; `[B]` where each response has its own.
        final_advantages: `[B]`, A_{R+1}, of what follows the last token; None: nothing follows, 0.

    Returns:
        Advantages (not whitened) and returns, each `[B, R]`, zero outside the mask.

    Raises:
        ValueError: a shape is wrong, or a response is empty or has holes.
    """
    check_tokens(mask, rewards=rewards, values=values)
    check_prefix(mask)
    discount: float | torch.Tensor
    if isinstance(gae_lambda, torch.Tensor):
        if gae_lambda.shape != mask.shape[:1]:
            raise ValueError(f"gae_lambda has shape {tuple(gae_lambda.shape)}; it must be [B], ({len(mask)},)")
        discount = gamma * gae_lambda.to(values.device, values.dtype)[:, None]
    else:
        discount = gamma * gae_lambda
    # beyond a row's end all terms are zero: its sums end with its own last token
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = rewards - values
    advantages[:, :-1] += gamma * values[:, 1:]
    if final_advantages is not None:
        last = mask.sum(1, keepdim=True) - 1
        advantages.scatter_add_(1, last, (discount * final_advantages[:, None]).to(values.dtype))
    reach = 1  # tokens whose terms are in each sum; twice as many after each round
    while reach < values.shape[1]:
        advantages[:, :-reach] += discount**reach * advantages[:, reach:]
        reach *= 2
    return advantages, advantages + values


def padding_advantages(
    reward: torch.Tensor, num_padding: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Compute the advantage of padding in which every token has the same reward: c * sum_{k < n} (gamma lambda)^k.

    In TRL 0.11 whitened rewards of padding are not zero, and its GAE runs over them.

    Args:
        reward: c, a scalar.
        num_padding: `[B]` integers, n, tokens between a sequence's end and the end of the longest.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        `[B]` of the reward's dtype.
    """
    discount, n = gamma * gae_lambda, num_padding.to(reward.dtype)
    return reward * (n if discount == 1 else (1 - discount**n) / (1 - discount))
