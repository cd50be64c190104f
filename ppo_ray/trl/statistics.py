"""TRL 0.11's statistics of a step, computed from the learner's update, and the trackers they are logged to.

Dimensions: B sequences, R response tokens, T prompt and response tokens of the longest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ppo_ray import trajectory
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.trl.config import PPOConfig


def step_statistics(update: UpdateReport, orders: Sequence[np.ndarray], mini_batch_size: int) -> dict[str, Any]:
    """Return every figure of TRL's `step`, but for its times; scalars are floats, the rest are arrays.

    Figures are means over TRL's mini-batches, each of them a mean over its tokens. Some arrays differ: log-probs and
    advantages are zero but for response tokens, for which alone they are computed; ratios are of those tokens only.

    Args:
        update: of the learner.
        orders: `[B]` each, the order of the rows in every epoch that was made.
        mini_batch_size: TRL's.
    """
    table, metrics = update.trajectories, update.metrics
    num_prompt, num_response = (
        trajectory.lengths(table, name).astype(np.float32) for name in ("prompt_ids", "response_ids")
    )
    columns = {name: trajectory.ragged(table, name) for name in trajectory.LEARNED_FIELDS}
    parts = [part for order in orders for part in np.array_split(order, len(order) // mini_batch_size)]

    def mean_of_parts(name: str, figure: Any) -> float:
        return float(np.mean([figure(np.concatenate([columns[name][row] for row in part])) for part in parts]))

    returns_var = mean_of_parts("returns", _variance)
    with np.errstate(divide="ignore", invalid="ignore"):  # returns that are all the same have nothing to explain
        var_explained = float(1 - np.float64(_mean(update, "value/error")) / np.float64(returns_var))
    return {
        "objective/kl": metrics["kl/per_sequence"],
        "objective/kl_dist": np.array([kl.sum() for kl in columns["kl"]], np.float32),
        "objective/logprobs": _frame(table, columns["old_logprobs"]),
        "objective/ref_logprobs": _frame(table, columns["ref_logprobs"]),
        "objective/kl_coef": metrics["kl/coef"],
        "objective/entropy": float(np.mean([-logprobs.sum() for logprobs in columns["old_logprobs"]])),
        "ppo/mean_non_score_reward": metrics["reward/kl_penalty_mean"],
        "ppo/mean_scores": metrics["score/used_mean"],
        "ppo/std_scores": metrics["score/used_std"],
        "tokens/queries_len_mean": float(num_prompt.mean()),
        "tokens/queries_len_std": _std(num_prompt),
        "tokens/queries_dist": num_prompt,
        "tokens/responses_len_mean": float(num_response.mean()),
        "tokens/responses_len_std": _std(num_response),
        "tokens/responses_dist": num_response,
        "ppo/loss/policy": _mean(update, "loss/policy"),
        "ppo/loss/value": _mean(update, "loss/value"),
        "ppo/loss/total": _mean(update, "loss/total"),
        "ppo/policy/entropy": _mean(update, "policy/entropy"),
        "ppo/policy/approxkl": _mean(update, "policy/approx_kl"),
        "ppo/policy/policykl": _mean(update, "policy/kl"),
        "ppo/policy/clipfrac": _mean(update, "policy/clip_fraction"),
        "ppo/policy/advantages": np.concatenate([_frame(table, columns["advantages"])[part].ravel() for part in parts]),
        "ppo/policy/advantages_mean": mean_of_parts("advantages", np.mean),
        "ppo/policy/ratio": np.concatenate([report.ratios for report in update.minibatches]),
        "ppo/returns/mean": mean_of_parts("returns", np.mean),
        "ppo/returns/var": returns_var,
        "ppo/val/vpred": _mean(update, "value/updated_mean"),
        "ppo/val/error": _mean(update, "value/error"),
        "ppo/val/clipfrac": _mean(update, "value/clip_fraction"),
        "ppo/val/mean": mean_of_parts("values", np.mean),
        "ppo/val/var": mean_of_parts("values", _variance),
        "ppo/val/var_explained": var_explained,
        "ppo/learning_rate": metrics["learner/learning_rate"],
    }


def _mean(update: UpdateReport, name: str) -> float:
    return float(np.mean([report.metrics[name] for report in update.minibatches]))


def _variance(figures: np.ndarray) -> float:
    """Return the unbiased variance; NaN of one figure, as TRL has it for a mini-batch of one token."""
    return float(figures.var(ddof=1, dtype=np.float64)) if len(figures) > 1 else float("nan")


def _std(lengths: np.ndarray) -> float:
    return float(lengths.std(ddof=1)) if len(lengths) > 1 else float("nan")


def _frame(table: pa.Table, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Lay `[R]` figures out as TRL does: `[B, T - 1]` float32, the figure of token t at t - 1."""
    starts = trajectory.lengths(table, "prompt_ids") - 1
    stops = starts + trajectory.lengths(table, "response_ids")
    frame = np.zeros((len(rows), int(stops.max())), np.float32)
    for row, start, stop, figures in zip(frame, starts, stops, rows, strict=True):
        row[start:stop] = figures
    return frame


def make_accelerator(config: PPOConfig) -> Accelerator:
    """Set up accelerate for its trackers and its device; it neither wraps models nor scales losses here.

    Raises:
        ValueError: accelerate was started with several processes.
    """
    accelerator = Accelerator(
        log_with=config.log_with,
        project_config=ProjectConfiguration(**config.project_kwargs),
        **config.accelerator_kwargs,
    )
    if accelerator.num_processes > 1:
        raise ValueError(
            f"{accelerator.num_processes} processes: PPOTrainer is one process. On several GPUs use `ppo-ray train`."
        )
    if config.log_with is not None:
        flat = config.to_dict()
        options = {name: value for name, value in flat.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(config.tracker_project_name, options, config.tracker_kwargs)
    return accelerator


def make_log_entries(
    stats: dict[str, Any], batch: dict[str, Any], scores: torch.Tensor, columns: list[str], log_with: str | None
) -> dict[str, Any]:
    """Put together what is logged of a step: statistics, scores, and for wandb a table of texts.

    Args:
        stats: of `PPOTrainer.step`.
        batch: texts and whatever else, by column.
        scores: `[B]`.
        columns: of the batch, for the table.
        log_with: the tracker; TensorBoard takes scalars only.

    Raises:
        ValueError: a column is not in the batch (wandb only).
    """
    entries = dict(stats)
    if log_with == "wandb":
        missing = [column for column in columns if column not in batch]
        if missing:
            raise ValueError(f"columns_to_log: {missing} are not in the batch, which has {sorted(batch)}")
        import wandb

        rows = [list(row) for row in zip(*(batch[column] for column in columns), scores.tolist(), strict=True)]
        entries["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=rows)
    entries["env/reward_mean"], entries["env/reward_std"] = float(scores.mean()), float(scores.std())
    entries["env/reward_dist"] = scores.numpy()
    if log_with == "tensorboard":
        return {name: value for name, value in entries.items() if np.ndim(value) == 0}
    return entries
