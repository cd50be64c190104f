"""Reward workers: a shell over `Scorer` that adds scores to trajectories."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from ppo_ray import trajectory
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import Config
from ppo_ray.reward.judge import StartJudge
from ppo_ray.reward.scorer import Scorer

SHARDS_AT_ONCE = 8
"""Shards that a worker scores at once, as far as their rewards wait for others."""


@ray.remote(concurrency_groups={**CONTROL, "scoring": SHARDS_AT_ONCE})
class RewardWorker(Worker):
    """Scores trajectories."""

    def setup(self, config: Config, start_judge: StartJudge | None = None) -> dict[str, float]:
        """Load the classifiers and judges, import the functions, read the tokens; returns the seconds it took."""
        start = time.perf_counter()
        if any(source.path or source.judge for _, source in config.reward.sources):
            from ppo_ray.models.loading import check_gpu  # loads torch

            check_gpu("reward.gpus", config.reward.gpus)
        self._reward, self._scorer = config.reward, Scorer(config, start_judge)
        self._failure: str | None = None
        self._clock = Clock()
        return {"time/reward_start_s": time.perf_counter() - start}

    @ray.method(num_returns=2, concurrency_group="scoring")
    def score(self, table: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """Return the trajectories with their scores, null where there is none, and metrics.

        Calls may overlap. Their seconds add up to the time in which there was any.
        """
        self._clock.begin()
        try:
            prompts, responses = table.column("prompt").to_pylist(), table.column("response").to_pylist()
            found = self._scorer.score(prompts, responses, lambda names: _read_columns(table, names))
            self._failure = found.failure or self._failure
            if not self._reward.parts:
                scored = trajectory.with_scores(table, found.parts[0], found.truncated)
            else:
                weights = {part.name: part.weight for part in self._reward.parts}
                parts = dict(zip(weights, found.parts, strict=True))
                scored = trajectory.with_parts(table, parts, weights, found.truncated)
        finally:
            seconds = self._clock.end()
        return scored, {"time/score_s": seconds, **self.measure_memory()}

    def explain(self) -> str | None:
        """Return why a text of the last `score` that had any without a score has none; None: every text had one."""
        return self._failure

    def count_flat(self, *tables: pa.Table) -> int:
        """Return how many groups of scored trajectories have scores that are all equal."""
        table = trajectory.concat(tables)
        return len(pc.unique(table.column("group_id").filter(pa.array(trajectory.find_flat(table)))))

    def summarize(self, num_rows: int, *tables: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the figures of scored trajectories, and prompt, response and score of the first `num_rows` of them.

        The figures are the columns `sample_id`, `score`, `finish_reason`, `parts` if there are any, and `num_tokens`.
        """
        table = trajectory.concat(tables)
        rows = table.select(["prompt", "response", "score"]).slice(0, num_rows)
        names = [name for name in ("sample_id", "score", "finish_reason", "parts") if name in table.column_names]
        num_tokens = pa.array(trajectory.lengths(table, "response_ids"))
        return table.select(names).append_column("num_tokens", num_tokens), rows.to_pylist()


class Clock:
    """The seconds in which any of several overlapping calls is at work, each told by one of them."""

    def __init__(self) -> None:
        self._lock, self._num_calls, self._since = threading.Lock(), 0, 0.0

    def begin(self) -> None:
        """Begin a call."""
        with self._lock:
            if not self._num_calls:
                self._since = time.perf_counter()
            self._num_calls += 1

    def end(self) -> float:
        """End a call; return the seconds since the end of the one before, or since the first began."""
        with self._lock:
            self._num_calls -= 1
            before, self._since = self._since, time.perf_counter()
            return self._since - before


def _read_columns(table: pa.Table, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return what a function or server is given beside prompts and responses, by name; no messages where none are."""
    columns: dict[str, list[Any]] = {}
    for name in names:
        match name:
            case "prompts" | "responses" | "prompt" | "response":
                continue
            case "finish_reasons" | "finish_reason":
                columns["finish_reasons"] = table.column("finish_reason").to_pylist()
            case "response_ids":
                columns[name] = table.column(name).to_pylist()
            case "messages" if name not in table.column_names:
                continue
            case "messages":
                columns[name] = [json.loads(text) for text in table.column(name).to_pylist()]
            case _:
                columns[name] = pc.struct_field(table.column("row"), name).to_pylist()
    return columns
