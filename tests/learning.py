"""Small learners and tables of trajectories, for the tests of whatever learns."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ppo_ray import trajectory
from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.learner.publisher import WeightPublisher
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.saving import write_tensors
from ppo_ray.weights.manifest import WeightManifest


def make_learner(folder: Path, budget: int = 1024, **ppo: Any) -> PPOLearner:
    """Load a float32 learner; options are not checked: tests go beyond what is allowed."""
    options = UpdateConfig(learning_rate=1e-3).model_copy(update=ppo)
    return PPOLearner.load(
        ModelConfig(path=str(folder)),
        options,
        LearnerConfig(microbatch_tokens=budget),
        temperature=1.0,
        device="cpu",
    )


def publish(publisher: WeightPublisher, learner: PPOLearner) -> tuple[WeightManifest, list[np.ndarray | None], str]:
    """Return what a rank publishes: the manifest, copies of the buckets, and the checksum that all ranks make."""
    found: list[np.ndarray | None] = []
    published = publisher.publish(learner)
    while True:
        try:
            bucket = next(published)
        except StopIteration as end:
            manifest, agreed = end.value
            return manifest, found, agreed
        found.append(None if bucket is None else bucket.copy())


def make_float64_learner(folder: Path, budget: int = 1024, lora: LoraConfig | None = None, **ppo: Any) -> PPOLearner:
    """Load a learner of a precision finer than what is offered, in which rounding hides nothing."""
    return load_learner(folder, {"dtype": "float64", "lora": lora}, {"microbatch_tokens": budget}, ppo)


def load_learner(
    folder: Path,
    model: dict[str, Any],
    learner: dict[str, Any],
    ppo: dict[str, Any],
    ranks: Ranks | None = None,
    checkpoint: Path | None = None,
) -> PPOLearner:
    """Load a learner of any options, checked or not, on the CPU."""
    return PPOLearner.load(
        ModelConfig.model_construct(path=str(folder), **model),
        UpdateConfig(learning_rate=1e-3).model_copy(update=ppo),
        LearnerConfig(**learner),
        temperature=0.7,
        device="cpu",
        ranks=ranks,
        checkpoint=checkpoint,
    )


def make_table(
    num_rows: int = 8,
    scores: list[float | None] | None = None,
    lengths: list[tuple[int, int]] | None = None,
    group_size: int | None = None,
) -> pa.Table:
    """Make trajectories; `lengths` are of prompt and response, drawn if they are not given.

    Prompts of more than 20 tokens have the first 20 in common. `group_size`: None: no groups.
    """
    rng = np.random.default_rng(num_rows)
    rows = []
    for index in range(num_rows):
        num_prompt, num_response = lengths[index] if lengths else (None, None)
        response = rng.integers(0, 500, num_response or rng.integers(1, 12)).tolist()  # 0 is end and pad too
        prompt = rng.integers(1, 500, num_prompt or rng.integers(1, 9))
        if len(prompt) > 20:
            prompt[:20] = np.arange(7, 27)
        rows.append(
            {
                "sample_id": index,
                "step": 0,
                "policy_version": 0,
                "worker": "rollout-0",
                "seed": index,
                "prompt": "p",
                "response": "r",
                "prompt_ids": prompt.tolist(),
                "response_ids": response,
                "rollout_logprobs": [-1.0] * len(response),
                "finish_reason": "length",
            }
        )
    groups = None
    if group_size:
        groups = pa.table({"group_id": pa.array([row // group_size for row in range(num_rows)], pa.int64())})
    return trajectory.with_scores(trajectory.from_rows(rows, groups), scores or rng.normal(size=num_rows).tolist())


def save_policy(policy: ActorCritic, folder: Path) -> None:
    """Write a model's files as a checkpoint of a learner holds them."""
    policy.save_configs(folder, torch.float32)
    for file in policy.list_files(policy.state_dict()):
        write_tensors(folder / file.path, file.rename(file.tensors))


def weights(learner: PPOLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights().tensors()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
