"""Figures of a step's trajectories, before anything is learned of them; docs/diagnostics.md explains each."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ppo_ray import trajectory
from ppo_ray.config import SOURCE
from ppo_ray.errors import WorkerError
from ppo_ray.learner.batch import ResponseBatch


def summarize_table(table: pa.Table, batch: ResponseBatch) -> dict[str, float]:
    """Summarise all trajectories of a step and their scores, as they were given."""
    num_rows = max(table.num_rows, 1)
    num_stopped = table.column("finish_reason").to_pylist().count("stop")
    tokens = trajectory.lengths(table, "response_ids")
    metrics = {
        "score/num_unscored": float(table.num_rows - batch.num_sequences),
        "score/truncated_rate": sum(filter(None, table.column("truncated").to_pylist())) / num_rows,
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
    if "group_id" in table.column_names:
        num_groups = len(np.unique(batch.groups))
        num_flat = len(np.unique(batch.groups[trajectory.find_flat(table)[batch.kept]]))
        metrics["groups/flat_fraction"] = num_flat / max(num_groups, 1)
    if "parts" in table.column_names:
        for name, part in zip(table.schema.field("parts").type.names, table.column("parts").flatten(), strict=True):
            known = part.drop_null().to_numpy().astype(np.float64)
            metrics[f"parts/{name}_unscored"] = 1 - len(known) / num_rows
            if len(known):
                spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
                metrics |= {f"parts/{name}_mean": float(known.mean()), f"parts/{name}_std": spread}
    return metrics


def summarize_sources(table: pa.Table, sources: Sequence[str]) -> dict[str, float]:
    """Summarise the scores of each data set of a mixture, as they were given.

    Args:
        table: of `trajectory.SCHEMA`, with the kept column `source`.
        sources: the data sets' names.

    Returns:
        For each that has trajectories in the table: `sources/NAME_unscored`, their share without a score, and
        `sources/NAME_score_mean`, if one has a score.
    """
    metrics: dict[str, float] = {}
    for name in sources:
        scores = table.column("score").filter(pc.equal(pc.struct_field(table.column("row"), SOURCE), name))
        if len(scores):
            metrics[f"sources/{name}_unscored"] = scores.null_count / len(scores)
        if scores.null_count < len(scores):
            metrics[f"sources/{name}_score_mean"] = pc.mean(scores).as_py()
    return metrics


def check_staleness(table: pa.Table, policy_version: int, limit: int) -> dict[str, float]:
    """Check that trajectories are of a policy that the learner had lately.

    Args:
        table: of `trajectory.SCHEMA`.
        policy_version: of the learner, before it learns from them.
        limit: the most updates that may lie between.

    Returns:
        Metrics by name: the mean and the largest staleness, in updates.

    Raises:
        WorkerError: a trajectory is staler, or of a policy that the learner has not had yet; names who sampled it.
    """
    versions = table.column("policy_version").to_numpy()
    staleness = policy_version - versions
    wrong = np.flatnonzero((staleness < 0) | (staleness > limit))
    if len(wrong):
        row = int(wrong[0])
        worker, sample = table.column("worker")[row], table.column("sample_id")[row]
        raise WorkerError(
            f"{worker} sampled the trajectory of sample {sample} with policy version {versions[row]}, but the learner "
            f"is at version {policy_version} and takes those of version {policy_version - limit} or later "
            f"(rollout.max_staleness={limit}); {len(wrong)} of {len(versions)} are like it. The engine does not serve "
            "the weights that it was sent"
        )
    return {"rollout/staleness_mean": float(staleness.mean()), "rollout/staleness_max": float(staleness.max())}
