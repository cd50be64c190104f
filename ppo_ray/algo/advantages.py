"""Advantages without a value function: of a response among those to the same prompt, and of the rewards to come.

A response's return is the sum of its rewards: its score, minus the KL penalty where that is in the reward. Advantages
of groups are computed in float64. A group whose returns are all equal, one of a single response too, teaches nothing:
its advantages are exactly 0.

Dimensions: B sequences, R response tokens, G groups.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ppo_ray.algo.masked import check_tokens
from ppo_ray.algo.rewards import gae

_GRPO_EPS = 1e-6  # DeepSeekMath's code, and verl's

Baseline = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(returns: torch.Tensor, groups: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    """Compare each response with the others to its prompt; every token of a response has its advantage.

    With the mean and the unbiased standard deviation of the returns G of a group of n:

    - grpo: (G_i - mean) / (std + 1e-6). Shao et al. 2024 (arXiv 2402.03300), sec. 4.1.2.
    - dr_grpo: G_i - mean. Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv 2503.20783), sec. 3.2.
    - rloo: (G_i - mean) n / (n - 1), which is G_i minus the mean of the others. Ahmadian et al. 2024
      (arXiv 2402.14740), eq. 8.

    Args:
        returns: `[B]` floating point, finite.
        groups: `[B]` int64, equal for the responses to one prompt; n is the number of those that are there.
        baseline: one of the three.

    Returns:
        `[B]` of the returns' dtype.

    Raises:
        ValueError: a shape or dtype is wrong, a return is not finite, or there is no such baseline.
    """
    spread = _Spread.of(returns, groups)
    centred = torch.where(spread.flat, 0, returns.double() - spread.mean)
    match baseline:
        case "grpo":
            variance = spread.sum(centred.square()) / (spread.count - 1).clamp(min=1)
            advantages = centred / (variance.sqrt() + _GRPO_EPS)
        case "dr_grpo":
            advantages = centred
        case "rloo":
            advantages = centred * spread.count / (spread.count - 1).clamp(min=1)
        case _:
            raise ValueError(f"baseline={baseline!r}; it must be grpo, dr_grpo or rloo")
    return advantages.to(returns.dtype)


def sum_rewards(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum each response's `[B, R]` rewards to its return, `[B]` float64."""
    check_tokens(mask, rewards=rewards)
    return torch.where(mask, rewards, 0).double().sum(1)


def rewards_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """Sum the rewards from each token on: sum_{k >= t} gamma^(k-t) r_k, REINFORCE's weight of a token.

    Williams 1992. With `masked_whiten` it is REINFORCE++ (Hu et al. 2025, arXiv 2501.03262, eq. 4 and 6). It is `gae`
    at lambda 1 with values of 0.

    Args:
        rewards: `[B, R]` floating point.
        mask: `[B, R]` bool; each row begins with its one or more response tokens.
        gamma: discount.

    Returns:
        `[B, R]`, zero outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def length_adaptive_lambda(num_tokens: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return each response's lambda for `gae`: 1 - 1 / max(alpha R_i, 1).

    So the rewards of the last 1 / alpha of a response reach any of its tokens, however long it is. Yue et al. 2025
    (VAPO, arXiv 2504.05118), sec. 4.2, with alpha = 0.05: 0 up to 20 tokens, 0.8 at 100, 0.98 at 1,000.

    Args:
        num_tokens: `[B]` integers, R_i, at least 1.
        alpha: above 0.

    Returns:
        `[B]` float64.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}; it must be above 0")
    return 1 - 1 / (alpha * num_tokens.double()).clamp(min=1)


@dataclass(frozen=True)
class _Spread:
    """What each sequence's group is like; all `[B]`, float64."""

    place: torch.Tensor
    """int64, of the group among the G."""
    num_groups: int
    count: torch.Tensor
    mean: torch.Tensor
    flat: torch.Tensor
    """bool, whether the largest and the smallest are equal."""

    @classmethod
    def of(cls, x: torch.Tensor, groups: torch.Tensor) -> "_Spread":
        if x.ndim != 1 or groups.shape != x.shape or groups.dtype != torch.int64 or not x.is_floating_point():
            raise ValueError(
                f"groups are {groups.dtype} {tuple(groups.shape)} and their figures {x.dtype} {tuple(x.shape)}; they "
                "must be int64 and floating point, [B] both"
            )
        if not x.isfinite().all():
            raise ValueError("a figure of a group is not finite; leave trajectories without a score out of the batch")
        names, place = torch.unique(groups, return_inverse=True)
        exact = x.double()
        ends = [
            torch.zeros(len(names), dtype=torch.float64, device=x.device).scatter_reduce(
                0, place, exact, end, include_self=False
            )[place]
            for end in ("amin", "amax")
        ]
        found = cls(place, len(names), torch.ones_like(exact), torch.zeros_like(exact), ends[0] == ends[1])
        count = found.sum(torch.ones_like(exact))
        return cls(place, len(names), count, found.sum(exact) / count, found.flat)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of `[B]` figures over each sequence's group."""
        return torch.zeros(self.num_groups, dtype=x.dtype, device=x.device).index_add(0, self.place, x)[self.place]
