"""The figures an update reports; `docs/diagnostics.md` says what each means and what to do about it."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.algo.masked import masked_mean, masked_sum, masked_var
from ppo_ray.config import UpdateConfig
from ppo_ray.learner.batch import ResponseBatch
from ppo_ray.learner.experience import Experience
from ppo_ray.learner.minibatch import MinibatchReport


def table_metrics(table: pa.Table, batch: ResponseBatch) -> dict[str, float]:
    """Summarise all trajectories of a step and their scores, as they were given."""
    num_rows = max(table.num_rows, 1)
    num_stopped = table.column("finish_reason").to_pylist().count("stop")
    tokens = trajectory.lengths(table, "response_ids")
    metrics = {
        "score/num_unscored": float(table.num_rows - batch.num_sequences),
        "response/tokens_mean": float(tokens.sum()) / num_rows,
        "response/tokens_min": float(tokens.min(initial=tokens.max(initial=0))),
        "response/tokens_max": float(tokens.max(initial=0)),
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


def experience_metrics(
    experience: Experience, batch: ResponseBatch, ppo: UpdateConfig, kl_coef: float
) -> dict[str, float]:
    """Summarise what is known before the update, over response tokens."""
    mask = batch.response_mask.to(experience.kl.device)
    kl_coef = kl_coef if ppo.kl_in == "reward" else 0.0
    log_weights = torch.where(mask, experience.old_logprobs - batch.rollout_logprobs.to(mask.device), 0)
    returns_var = masked_var(experience.returns, mask)
    residuals = torch.where(mask, experience.returns - experience.values, 0)
    figures = {
        "score/used_mean": experience.scores.mean(),
        "score/used_std": experience.scores.std() if batch.num_sequences > 1 else torch.zeros(()),
        "kl/per_sequence": masked_sum(experience.kl, mask) / batch.num_sequences,
        "kl/per_token": masked_mean(experience.kl, mask),
        "reward/kl_penalty_mean": -kl_coef * masked_mean(experience.kl, mask),
        "value/mean": masked_mean(experience.values, mask),
        "value/std": masked_var(experience.values, mask).sqrt(),
        "value/explained_variance_before": 1 - masked_var(residuals, mask) / returns_var.clamp(min=1e-12),
        "advantages/mean": masked_mean(experience.advantages, mask),
        "advantages/std": masked_var(experience.advantages, mask).sqrt(),
        "returns/mean": masked_mean(experience.returns, mask),
        "returns/std": returns_var.sqrt(),
        "mismatch/logprob_mean": masked_mean(log_weights.abs(), mask),
        "mismatch/logprob_max": log_weights.abs().max(),
        "mismatch/kl": masked_mean(torch.expm1(log_weights) - log_weights, mask),
    }
    if experience.importance is not None and ppo.importance_cap is not None:
        capped = (experience.importance >= ppo.importance_cap).to(log_weights.dtype)
        figures |= {
            "mismatch/importance_mean": masked_mean(experience.importance, mask),
            "mismatch/capped_fraction": masked_mean(capped, mask),
        }
    return {name: float(figure) for name, figure in figures.items()}


def update_metrics(reports: Sequence[MinibatchReport], returns_std: float) -> dict[str, float]:
    """Average the mini-batches of all epochs, as TRL does, those that made no optimizer step included.

    Those that were not finite only count; a figure that none of them leaves is NaN.
    """
    finite = [report for report in reports if report.outcome != "nonfinite"]
    stepped = [report for report in finite if report.outcome == "stepped"]

    def mean(name: str, of: Sequence[MinibatchReport] = finite) -> float:
        return float(np.mean([getattr(report, name) for report in of])) if of else float("nan")

    def count(outcome: str) -> float:
        return float(sum(report.outcome == outcome for report in reports))

    return {
        "loss/policy": mean("policy_loss"),
        "loss/value": mean("value_loss"),
        "loss/kl": mean("kl_loss"),
        "loss/total": mean("total_loss"),
        "policy/approx_kl": mean("approx_kl"),
        "policy/kl": mean("kl"),
        "policy/clip_fraction": mean("clip_fraction"),
        "policy/dual_clip_fraction": mean("dual_clip_fraction"),
        "policy/entropy": mean("entropy"),
        "policy/ratio_mean": mean("ratio_mean"),
        "policy/ratio_max": max((report.ratio_max for report in finite), default=float("nan")),
        "policy/ratio_min": min((report.ratio_min for report in finite), default=float("nan")),
        "policy/ratio_first": reports[0].ratio_mean,
        "policy/grad_norm": mean("grad_norm", stepped),
        "policy/optimizer_steps": float(len(stepped)),
        "policy/skipped_minibatches": count("ratio_exceeded"),
        "policy/nonfinite_minibatches": count("nonfinite"),
        "value/clip_fraction": mean("value_clip_fraction"),
        "value/explained_variance": 1 - mean("value_error") / max(returns_std**2, 1e-12),
    }
