"""Generalised advantage estimation over responses of different lengths.

Dimensions: B sequences, R response tokens.
"""

import torch

from ppo_ray.algo.masked import check_prefix, check_tokens


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    final_advantages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate advantages and returns, backwards from the last token of each response.

    With V(s_R) = 0 after the end:
    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma * lambda * A_{t+1};  returns_t = A_t + V(s_t).
    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; TRL 0.11's `compute_advantages`.

    Args:
        rewards: `[B, R]` floating point.
        values: `[B, R]`, of the prefix before each token.
        mask: `[B, R]` bool; each row begins with its one or more response tokens.
        gamma: discount.
        gae_lambda: 0 trusts the value head, 1 the sampled rewards.
        final_advantages: `[B]`, A_{R+1}, of what follows the last token; None: nothing follows, 0.

    Returns:
        Advantages (not whitened) and returns, each `[B, R]`, zero outside the mask.

    Raises:
        ValueError: a shape is wrong, or a response is empty or has holes.
    """
    check_tokens(mask, rewards=rewards, values=values)
    check_prefix(mask)
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    last = mask.sum(1) - 1
    for t in reversed(range(values.shape[1])):
        if final_advantages is not None:
            next_advantage = torch.where(last == t, final_advantages, next_advantage)
        # beyond a row's end all terms are zero, so its recursion starts with the bootstrap 0 at its own last token
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
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
