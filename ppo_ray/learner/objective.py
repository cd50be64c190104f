"""The objective of a micro-batch: policy loss, value loss, KL and entropy terms; and its metrics over an update.

Dimensions: B sequences of the micro-batch, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppo_ray.algo.kl import kl_estimate
from ppo_ray.algo.losses import ValueLoss, clipped_value_loss
from ppo_ray.algo.masked import weighted_sum
from ppo_ray.config import UpdateConfig
from ppo_ray.learner.experience import Experience
from ppo_ray.learner.reports import MinibatchReport, Outcome
from ppo_ray.learner.surrogate import Surrogate
from ppo_ray.models.response_lm import ResponseOutput


@dataclass(frozen=True)
class Objective:
    """A micro-batch's share of a mini-batch's loss; all scalars but `ratios`."""

    loss: torch.Tensor
    """With gradient: policy + value_coef * value + kl_coef * kl - entropy_coef * entropy, without what there is not."""
    metrics: dict[str, torch.Tensor]
    """Scalars, shares of the mini-batch's metrics by their final names; without gradient."""
    ratios: torch.Tensor
    """`[B, R]`, probability ratios of the response tokens; without gradient."""


def objective(
    output: ResponseOutput,
    experience: Experience,
    place: tuple[torch.Tensor, slice],
    mask: torch.Tensor,
    weights: torch.Tensor,
    ppo: UpdateConfig,
    kl_coef: float,
    surrogate: Surrogate,
) -> Objective:
    """Compute the loss of a micro-batch.

    Args:
        output: of the policy, `[B, R]` each.
        experience: of the whole batch.
        place: where in it the micro-batch is: rows and columns.
        mask: `[B, R]` bool.
        weights: `[B]`, of each token of a sequence; see `algo.losses`.
        ppo: the algorithm.
        kl_coef: weight of the KL in the loss.
        surrogate: the policy's loss.
    """
    importance = experience.importance
    policy = surrogate(
        output.logprobs,
        experience.old_logprobs[place],
        experience.advantages[place],
        mask,
        weights,
        importance=None if importance is None else importance[place],
    )
    value: ValueLoss | None = None
    loss = policy.loss
    if experience.values is not None and experience.returns is not None:
        assert output.values is not None
        value = clipped_value_loss(
            output.values,
            experience.values[place],
            experience.returns[place],
            mask,
            weights,
            value_clip_range=ppo.value_clip_range,
        )
        loss = loss + ppo.value_coef * value.loss
    entropy = weighted_sum(output.entropies, mask, weights)
    kl = torch.zeros_like(loss)
    if ppo.kl_in == "loss":
        if ppo.kl_estimator == "full":
            raise ValueError("kl_estimator=full is for kl_in=reward; in the loss take k2 or k3")
        ref_logprobs = experience.ref_logprobs[place]
        estimates = kl_estimate(output.logprobs, ref_logprobs, mask, ppo.kl_estimator, ppo.kl_clamp)
        kl = weighted_sum(estimates, mask, weights)
        loss = loss + kl_coef * kl
    if ppo.entropy_coef:
        loss = loss - ppo.entropy_coef * entropy
    metrics = {
        "loss/policy": policy.loss,
        "loss/kl": kl,
        "loss/total": loss,
        "policy/approx_kl": policy.approx_kl,
        "policy/kl": policy.kl,
        "policy/clip_fraction": policy.clipped,
        "policy/dual_clip_fraction": policy.dual_clipped,
        "policy/entropy": entropy,
        "policy/ratio_mean": weighted_sum(policy.ratio, mask, weights),
    }
    if value is not None:
        metrics |= {
            "loss/value": value.loss,
            "value/clip_fraction": value.clipped,
            "value/error": value.error,
            "value/updated_mean": value.value,
        }
    if ppo.own_policy_loss:  # of which no clipping is known
        del metrics["policy/clip_fraction"], metrics["policy/dual_clip_fraction"]
    return Objective(loss, {name: metric.detach() for name, metric in metrics.items()}, policy.ratio)


def summarize_minibatches(reports: Sequence[MinibatchReport], returns_std: float | None) -> dict[str, float]:
    """Average the metrics of all mini-batches of all epochs, as TRL does, those without an optimizer step included.

    A mini-batch that was not finite only counts as such. With none left every mean is NaN.

    Args:
        reports: of the mini-batches.
        returns_std: of the returns that values learn; None: there are no values.
    """
    finite = [report for report in reports if report.outcome != "nonfinite"]
    norms = [report.grad_norm for report in finite if report.outcome == "stepped"]

    def count(outcome: Outcome) -> float:
        return float(sum(report.outcome == outcome for report in reports))

    means = {name: _mean([report.metrics[name] for report in finite]) for name in reports[0].metrics}
    if returns_std is not None:
        means["value/explained_variance"] = 1 - means["value/error"] / max(returns_std**2, 1e-12)
    return means | {
        "policy/ratio_max": max((report.ratio_max for report in finite), default=float("nan")),
        "policy/ratio_min": min((report.ratio_min for report in finite), default=float("nan")),
        "policy/approx_kl_first": reports[0].metrics["policy/approx_kl"],
        "policy/ratio_first": reports[0].metrics["policy/ratio_mean"],
        "policy/grad_norm": _mean(norms),
        "policy/optimizer_steps": float(len(norms)),
        "policy/skipped_minibatches": count("ratio_exceeded"),
        "policy/nonfinite_minibatches": count("nonfinite"),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
