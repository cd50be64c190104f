"""Small learners and tables of trajectories, for the tests of whatever learns."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.config import LearnerConfig, ModelConfig, PPOConfig
from ppo_ray.learner import PPOLearner
from ppo_ray.ranks import Ranks


def make_learner(folder: Path, budget: int = 1024, **ppo: Any) -> PPOLearner:
    """Load a float32 learner; options are not checked: tests go beyond what is allowed."""
    options = PPOConfig(learning_rate=1e-3).model_copy(update=ppo)
    return PPOLearner.load(
        ModelConfig(path=str(folder)), options, LearnerConfig(microbatch_tokens=budget), device="cpu"
    )


def make_float64_learner(folder: Path, budget: int = 1024, ranks: Ranks | None = None, **ppo: Any) -> PPOLearner:
    """Load a learner of a precision finer than what is offered, in which rounding hides nothing."""
    return PPOLearner.load(
        ModelConfig.model_construct(path=str(folder), dtype="float64"),
        PPOConfig(learning_rate=1e-3).model_copy(update=ppo),
        LearnerConfig(microbatch_tokens=budget),
        temperature=0.7,
        device="cpu",
        ranks=ranks,
    )


def make_table(num_rows: int = 8, scores: list[float | None] | None = None) -> pa.Table:
    rng = np.random.default_rng(num_rows)
    rows = []
    for index in range(num_rows):
        response = rng.integers(0, 500, rng.integers(1, 12)).tolist()  # 0 is the end of sequence and the pad token too
        rows.append(
            {
                "sample_id": index,
                "step": 0,
                "policy_version": 0,
                "worker": "rollout-0",
                "seed": index,
                "prompt": "p",
                "response": "r",
                "prompt_ids": rng.integers(1, 500, rng.integers(1, 9)).tolist(),
                "response_ids": response,
                "rollout_logprobs": [-1.0] * len(response),
                "finish_reason": "length",
            }
        )
    return trajectory.with_scores(trajectory.from_rows(rows), scores or rng.normal(size=num_rows).tolist())


def weights(learner: PPOLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights().tensors()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
