"""Reward workers: a shell over a classifier or a reward function that fills in the scores."""

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup, Shards
from ppo_ray.actors.placement import reward_spec
from ppo_ray.config import Config
from ppo_ray.evaluation import Sample
from ppo_ray.reward_function import RewardFunction


@ray.remote
class RewardWorker:
    """Scores trajectories."""

    def __init__(self, name: str) -> None:
        self._name = name

    def setup(self, config: Config) -> dict[str, float]:
        """Load the classifier, or import the function; returns the seconds it took."""
        start = time.perf_counter()
        reward = config.reward
        self._function = RewardFunction(reward.function) if reward.function else None
        if reward.path:
            from ppo_ray.models.classifier import Classifier

            self._classifier = Classifier(
                reward.path, label=reward.label, transform=reward.transform, batch_size=reward.batch_size
            )
        return {"time/reward_start_s": time.perf_counter() - start}

    @ray.method(num_returns=2)
    def score(self, table: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """Return the trajectories with their scores, null where there is none, and metrics."""
        start = time.perf_counter()
        prompts, responses = table.column("prompt").to_pylist(), table.column("response").to_pylist()
        if self._function:
            scores = self._function.score(prompts, responses)
        else:
            scores = self._classifier.score(
                [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            )
        return trajectory.with_scores(table, scores), {"time/score_s": time.perf_counter() - start}

    def summarize(self, table: pa.Table, num_samples: int) -> tuple[list[float | None], list[Sample]]:
        """Return all scores of scored trajectories, and the first few of them in full: what an evaluation reads."""
        rows = table.slice(0, num_samples).to_pylist()
        samples = [Sample(row["prompt"], row["response"], row["score"]) for row in rows]
        return table.column("score").to_pylist(), samples

    def close(self) -> None:
        """Nothing to free; the group ends the process."""


class RewardGroup:
    """All reward workers; what the loop calls `reward`."""

    def __init__(self, config: Config) -> None:
        """Create the workers; `setup` loads their classifiers."""
        self._config = config
        self._group = ActorGroup(RewardWorker, reward_spec(config), config.ray.call_timeout_s)

    def setup(self) -> list[dict[str, float]]:
        """Load all classifiers at once and wait until they are ready."""
        return self._group.setup(self._config.ray.start_timeout_s, self._config)

    def score(self, trajectories: Shards) -> Shards:
        """Score shards, each as soon as it is there; returns at once."""
        calls = [_score_call(table) for table in trajectories.tables]
        return self._group.deal("scoring", calls, source=trajectories)

    def summarize(self, scored: Shards, num_samples: int) -> tuple[list[float | None], list[Sample]]:
        """Wait for the scores of all shards and their first samples."""
        scored.wait()
        refs = [self._group.handles[0].summarize.remote(table, num_samples) for table in scored.tables]
        answers = self._group.wait("summarizing", refs)
        scores = [score for shard_scores, _ in answers for score in shard_scores]
        samples = [sample for _, shard_samples in answers for sample in shard_samples]
        return scores, samples[:num_samples]

    def close(self) -> None:
        """End the workers."""
        self._group.close()


def _score_call(table: Any) -> Callable[[Any], Any]:
    return lambda handle: handle.score.remote(table)
