"""Staleness: how many updates the learner's policy has seen since it sampled a trajectory."""

import numpy as np
import pyarrow as pa

from ppo_ray.errors import WorkerError


def check_staleness(table: pa.Table, policy_version: int, limit: int) -> dict[str, float]:
    """Check that trajectories are of a policy that the learner had lately.

    Args:
        table: of `trajectory.SCHEMA`.
        policy_version: of the learner, before it learns from them.
        limit: the most updates that may lie between.

    Returns:
        Figures by name: the mean and the largest staleness, in updates.

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
