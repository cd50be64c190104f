"""Reward workers: a shell over `Classifier` or `RewardFunction` that adds scores to trajectories."""

import time
from typing import Any

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config
from ppo_ray.reward.function import RewardFunction


@ray.remote(concurrency_groups=CONTROL)
class RewardWorker(Worker):
    """Scores trajectories."""

    def setup(self, config: Config) -> dict[str, float]:
        """Load the classifier, or import the function; returns the seconds it took."""
        start = time.perf_counter()
        reward = config.reward
        self._failure: str | None = None
        self._function = RewardFunction(reward.function) if reward.function else None
        if reward.path:
            from ppo_ray.reward.classifier import Classifier

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
            scores, truncated = self._function.score(prompts, responses), None
            self._failure = self._function.failure or self._failure
        else:
            texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            scores, truncated = self._classifier.score(texts), self._classifier.truncated
            self._failure = self._classifier.failure or self._failure
        scored = trajectory.with_scores(table, scores, truncated)
        return scored, {"time/score_s": time.perf_counter() - start}

    def explain(self) -> str | None:
        """Return why a text of the last `score` that had any without a score has none; None: every text had one."""
        return self._failure

    def summarize(self, num_rows: int, *tables: pa.Table) -> tuple[list[float | None], list[dict[str, Any]]]:
        """Return all scores of scored trajectories, and prompt, response and score of the first `num_rows` of them."""
        table = trajectory.concat(tables)
        rows = table.select(["prompt", "response", "score"]).slice(0, num_rows)
        return table.column("score").to_pylist(), rows.to_pylist()
