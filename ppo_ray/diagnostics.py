"""The figures an update reports; see `PPOLearner.update`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.algo.losses import PolicyLoss, ValueLoss
from ppo_ray.algo.masked import masked_mean, masked_sum, masked_var
from ppo_ray.batch import ResponseBatch


@dataclass(frozen=True)
class Experience:
    """What is known of a batch before it is learnt from; all `[B, R]`, zero outside the response mask."""

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    """Of the prefix before each token, by the value head before the update."""
    kl: torch.Tensor
    """The log-ratio estimate."""
    rewards: torch.Tensor
    """KL penalty and, on the last token, the score."""
    advantages: torch.Tensor
    """Whitened, if that is configured."""
    returns: torch.Tensor


@dataclass(frozen=True)
class MinibatchReport:
    """One optimizer step, or one that was skipped; means are over the mini-batch's response tokens."""

    policy_loss: float
    value_loss: float
    total_loss: float
    ratio_mean: float
    ratio_max: float
    clip_fraction: float
    approx_kl: float
    kl: float
    entropy: float
    value_clip_fraction: float
    value_error: float
    grad_norm: float
    """Before clipping; NaN if skipped."""
    skipped: bool


class MinibatchSums:
    """Adds up the micro-batches of one mini-batch, on the device, until `report`."""

    def __init__(self, num_tokens: int, value_coef: float) -> None:
        """Start at zero; `num_tokens` are the mini-batch's response tokens."""
        self._num_tokens, self._value_coef = num_tokens, value_coef
        self._sums: torch.Tensor | None = None
        self._ratio_max: list[torch.Tensor] = []

    def add(self, policy: PolicyLoss, value: ValueLoss, entropy_sum: torch.Tensor) -> None:
        """Add a micro-batch."""
        figures = [policy.ratio_sum, policy.clipped_sum, policy.approx_kl_sum, policy.kl_sum, entropy_sum]
        figures += [value.clipped_sum, value.error_sum]
        # losses are shares already: bring them to the scale of the sums
        figures += [loss.detach() * self._num_tokens for loss in (policy.loss, value.loss)]
        sums = torch.stack(figures)
        self._sums = sums if self._sums is None else self._sums + sums
        self._ratio_max.append(policy.ratio_max)

    def report(self) -> MinibatchReport:
        """Turn the sums into means; the gradient's norm and the skipping are filled in by the learner."""
        assert self._sums is not None
        means = (self._sums.double() / self._num_tokens).tolist()
        ratio, clipped, approx_kl, kl, entropy, value_clipped, value_error, policy_loss, value_loss = means
        return MinibatchReport(
            policy_loss=policy_loss,
            value_loss=value_loss,
            total_loss=policy_loss + self._value_coef * value_loss,
            ratio_mean=ratio,
            ratio_max=float(torch.stack(self._ratio_max).max()),
            clip_fraction=clipped,
            approx_kl=approx_kl,
            kl=kl,
            entropy=entropy,
            value_clip_fraction=value_clipped,
            value_error=value_error,
            grad_norm=float("nan"),
            skipped=False,
        )


def table_metrics(table: pa.Table, batch: ResponseBatch) -> dict[str, float]:
    """Summarise all trajectories of a step and their scores."""
    num_rows = max(table.num_rows, 1)
    num_stopped = table.column("finish_reason").to_pylist().count("stop")
    metrics = {
        "score/num_unscored": float(table.num_rows - batch.num_sequences),
        "response/tokens_mean": float(trajectory.lengths(table, "response_ids").sum()) / num_rows,
        "response/eos_rate": num_stopped / num_rows,
        "learner/tokens": float(batch.num_tokens.sum()),
    }
    if batch.num_sequences:
        scores = batch.scores.double()
        metrics |= {
            "score/mean": float(scores.mean()),
            "score/std": float(scores.std()) if len(scores) > 1 else 0.0,
            "score/min": float(scores.min()),
            "score/max": float(scores.max()),
        }
    return metrics


def experience_metrics(experience: Experience, batch: ResponseBatch, kl_coef: float) -> dict[str, float]:
    """Summarise what is known before the update, over response tokens."""
    mask = batch.response_mask.to(experience.kl.device)
    mismatch = (batch.rollout_logprobs.to(experience.kl.device) - experience.old_logprobs).abs()
    figures = {
        "kl/per_sequence": masked_sum(experience.kl, mask) / batch.num_sequences,
        "kl/per_token": masked_mean(experience.kl, mask),
        "reward/kl_penalty_mean": -kl_coef * masked_mean(experience.kl, mask),
        "value/mean": masked_mean(experience.values, mask),
        "advantages/mean": masked_mean(experience.advantages, mask),
        "advantages/std": masked_var(experience.advantages, mask).sqrt(),
        "returns/mean": masked_mean(experience.returns, mask),
        "returns/std": masked_var(experience.returns, mask).sqrt(),
        "mismatch/logprob_mean": masked_mean(mismatch, mask),
        "mismatch/logprob_max": torch.where(mask, mismatch, 0).max(),
    }
    return {name: float(figure) for name, figure in figures.items()} | {"kl/coef": kl_coef}


def update_metrics(reports: Sequence[MinibatchReport], returns_std: float) -> dict[str, float]:
    """Average the mini-batches of all epochs, as TRL does; skipped ones count too, but for the gradient's norm."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(report, name) for report in reports]))

    norms = [report.grad_norm for report in reports if not report.skipped]
    return {
        "loss/policy": mean("policy_loss"),
        "loss/value": mean("value_loss"),
        "loss/total": mean("total_loss"),
        "policy/approx_kl": mean("approx_kl"),
        "policy/kl": mean("kl"),
        "policy/clip_fraction": mean("clip_fraction"),
        "policy/entropy": mean("entropy"),
        "policy/ratio_mean": mean("ratio_mean"),
        "policy/ratio_max": max(report.ratio_max for report in reports),
        "policy/ratio_first": reports[0].ratio_mean,
        "policy/grad_norm": float(np.mean(norms)) if norms else 0.0,
        "policy/skipped_minibatches": float(sum(report.skipped for report in reports)),
        "value/clip_fraction": mean("value_clip_fraction"),
        "value/explained_variance": 1 - mean("value_error") / max(returns_std**2, 1e-12),
    }
