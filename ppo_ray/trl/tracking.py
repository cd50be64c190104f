"""What a trainer logs, and accelerate, whose trackers it logs to."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ppo_ray.trl.config import PPOConfig


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


def log_entries(
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
