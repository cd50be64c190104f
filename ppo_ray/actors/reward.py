"""Reward workers: a shell over a classifier or a reward function that fills in the scores."""

import time
from typing import Any

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import Seats, reward_spec
from ppo_ray.actors.shards import Shards
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config
from ppo_ray.evaluation import Sample
from ppo_ray.events import Report
from ppo_ray.reward_function import RewardFunction


@ray.remote(concurrency_groups=CONTROL)
class RewardWorker(Worker):
    """Scores trajectories."""

    def setup(self, config: Config) -> dict[str, float]:
        """Load the classifier, or import the function; returns the seconds it took."""
        start = time.perf_counter()
        reward = config.reward
        self._function = RewardFunction(reward.function) if reward.function else None
        if reward.path:
            from ppo_ray.models.classifier import Classifier

            self._classifier = Classifier(
                reward.path,
                label=reward.label,
                transform=reward.transform,
                batch_size=reward.batch_size,
                trust=reward.trust,
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

    def summarize(self, num_samples: int, *tables: pa.Table) -> tuple[list[float | None], list[Sample]]:
        """Return all scores of scored trajectories, and the first few of them in full: what an evaluation reads."""
        table = trajectory.concat(tables)
        rows = table.slice(0, num_samples).to_pylist()
        samples = [Sample(row["prompt"], row["response"], row["score"]) for row in rows]
        return table.column("score").to_pylist(), samples


class RewardGroup:
    """All reward workers; what the loop calls `reward`."""

    def __init__(self, config: Config, report: Report, seats: Seats | None = None, worker: Any = RewardWorker) -> None:
        """Create the workers, actors of a class; `setup` loads their classifiers."""
        self._config = config
        self._group = ActorGroup(worker, reward_spec(config), config.ray, report, seats)

    def setup(self) -> list[dict[str, float]]:
        """Load all classifiers at once and wait until they are ready."""
        return self._group.setup(self._config)

    def score(self, trajectories: Shards) -> Shards:
        """Score shards, each as soon as it is there; returns at once."""
        calls = [lambda handle, table: handle.score.remote(table)] * len(trajectories.tables)
        return Shards(self._group, "scoring", calls, self._config.ray.call_timeout_s, source=trajectories)

    def summarize(self, scored: Shards, num_samples: int) -> tuple[list[float | None], list[Sample]]:
        """Wait for the scores of all shards and their first samples."""
        doing = "summarizing"
        return scored.use(
            lambda tables: self._group.call_first(doing, lambda handle: handle.summarize.remote(num_samples, *tables))
        )

    def close(self) -> None:
        """End the workers."""
        self._group.close()
