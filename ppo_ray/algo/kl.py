"""KL divergence of policy and reference: estimates per token, and controllers of the penalty's coefficient.

Dimensions: B sequences, R response tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ppo_ray.algo.masked import check_tokens

_MAX_RELATIVE_ERROR = 0.2  # Ziegler et al. 2019, sec. 2.2: the coefficient moves by at most 20% * n / horizon at once

_MAX_EXPONENT = 20  # of k3's exp, where the estimate is clamped: the gradient of an infinite one would be NaN

KLEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_estimate(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    estimator: KLEstimator = "k1",
    clamp: float | None = None,
) -> torch.Tensor:
    """Estimate KL(policy || reference) from each sampled token, with d = log p(token) - log p_ref(token).

    - k1 = d: unbiased, noisy, negative where the reference likes the token better (TRL 0.11: "kl"). Its gradient
      does not depend on the reference: in a loss it teaches nothing on the policy's own samples, and misleads on
      those of another policy.
    - k2 = d^2 / 2: biased, never negative; its gradient is that of the KL divergence (TRL 0.11: "mse").
    - k3 = exp(-d) - 1 + d: unbiased, never negative, but without bound where the reference likes the token far
      better: 396 at d = -6. In a loss, on the policy's own samples, its gradient is that of KL(reference || policy),
      not of KL(policy || reference) (Tang and Munos 2025, arXiv 2506.09477).
    - abs = |d| (TRL 0.11: "abs"); no estimate of the KL divergence, but of the distance in log-probability.

    Schulman 2020, "Approximating KL divergence". The divergence itself, over the whole vocabulary, needs the logits:
    `models.token_logprobs.full_kl`.

    Args:
        logprobs: `[B, R]` floating point, of the policy.
        ref_logprobs: `[B, R]`, of the reference.
        mask: `[B, R]` bool.
        estimator: one of the four.
        clamp: holds each token's estimate within plus and minus this; beyond it there is no gradient. None: as it is.

    Returns:
        `[B, R]`, zero outside the mask.
    """
    check_tokens(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    difference = torch.where(mask, logprobs - ref_logprobs, 0)
    match estimator:
        case "k1":
            estimates = difference
        case "k2":
            estimates = 0.5 * difference.square()
        case "k3":
            exponent = -difference if clamp is None else (-difference).clamp(max=_MAX_EXPONENT)
            estimates = torch.expm1(exponent) + difference
        case "abs":
            estimates = difference.abs()
        case _:
            raise ValueError(f"estimator={estimator!r}; it must be k1, k2, k3 or abs")
    return estimates if clamp is None else estimates.clamp(-clamp, clamp)


@dataclass(frozen=True)
class AdaptiveKLController:
    """A controller that steers the KL per sequence towards a target.

    Ziegler et al. 2019, sec. 2.2; TRL 0.11's AdaptiveKLController.
    """

    kl_coef: float
    """Weight of the KL penalty."""
    target: float
    """Wanted KL, summed over a sequence's tokens (not averaged: verl and OpenRLHF use another scale)."""
    horizon: float
    """Sequences over which a full error of 20% moves the coefficient by 20%."""

    def adapt(self, kl_per_sequence: float, num_sequences: int) -> "AdaptiveKLController":
        """Return the controller after a batch: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.

        A KL of NaN leaves the controller as it is.
        """
        if math.isnan(kl_per_sequence):
            return self
        error = min(max(kl_per_sequence / self.target - 1, -_MAX_RELATIVE_ERROR), _MAX_RELATIVE_ERROR)
        return replace(self, kl_coef=self.kl_coef * (1 + error * num_sequences / self.horizon))


@dataclass(frozen=True)
class FixedKLController:
    """A controller that keeps the coefficient as it is."""

    kl_coef: float
    """Weight of the KL penalty."""

    def adapt(self, kl_per_sequence: float, num_sequences: int) -> "FixedKLController":
        """Return the controller itself."""
        return self


KLController = AdaptiveKLController | FixedKLController
