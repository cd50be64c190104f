"""The learner's actor: a shell over `PPOLearner`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup, PublishedWeights, Shards
from ppo_ray.actors.placement import learner_spec
from ppo_ray.config import Config
from ppo_ray.errors import NonFiniteError, WorkerError
from ppo_ray.weights import WeightSnapshot

if TYPE_CHECKING:
    from ppo_ray import learner


@dataclass(frozen=True)
class UpdateReport:
    """What the driver learns of an update: figures, and the name of the new weights. Never the weights."""

    metrics: dict[str, float]
    policy_version: int
    checksum: str


@dataclass(frozen=True)
class Update:
    """An update as the driver sees it."""

    metrics: dict[str, float]
    """Of generation, scoring and learning."""
    weights: PublishedWeights


@dataclass(frozen=True)
class LearnerStep:
    """An update in full, for a caller that works with trajectories itself."""

    update: "learner.Update"
    kl_coef: float
    """Of the next update."""
    value_head: dict[str, np.ndarray]
    policy_version: int
    checksum: str


@ray.remote
class LearnerWorker:
    """Holds the policy that is trained."""

    def __init__(self, name: str) -> None:
        self._name = name

    def setup(self, config: Config) -> dict[str, float]:
        """Load policy and reference; returns the seconds it took."""
        import torch

        from ppo_ray.learner import PPOLearner

        start = time.perf_counter()
        torch.set_num_threads(config.learner.threads)
        self._learner = PPOLearner.load(
            config.model,
            config.ppo,
            config.learner,
            temperature=config.rollout.temperature,
            seed=config.seed,
            num_steps=config.steps,
        )
        return {"time/learner_start_s": time.perf_counter() - start}

    @ray.method(num_returns=2)
    def update(self, step: int, path: str, *shards: pa.Table) -> tuple[UpdateReport, WeightSnapshot]:
        """Make one PPO update on all shards together; write the trajectories and what was learnt of them to `path`.

        Raises:
            WorkerError: a loss or gradient is not finite; the mini-batch that made it is written beside `path`.
        """
        start = time.perf_counter()
        try:
            update = self._learner.update(trajectory.concat(shards), step)
        except NonFiniteError as error:
            dump = Path(path).with_name(f"{Path(path).stem}-nonfinite.parquet")
            write_trajectories(dump, error.trajectories)
            raise WorkerError(f"{error} The mini-batch that made it is in {dump}.") from error
        snapshot = self._learner.weights()
        write_trajectories(Path(path), update.trajectories)
        metrics = update.metrics | {"time/learn_s": time.perf_counter() - start}
        return UpdateReport(metrics, snapshot.policy_version, snapshot.checksum), snapshot

    @ray.method(num_returns=2)
    def step(
        self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float
    ) -> tuple["LearnerStep", WeightSnapshot]:
        """Make one PPO update with the caller's order of rows and KL coefficient; returns all that is known of it."""
        self._learner.controller = replace(self._learner.controller, kl_coef=kl_coef)
        update = self._learner.update(table, step, orders.__getitem__)
        snapshot = self._learner.weights()
        names = snapshot.policy_version, snapshot.checksum
        return LearnerStep(update, self._learner.kl_coef, self._learner.value_head(), *names), snapshot

    @ray.method(num_returns=2)
    def weights(self) -> tuple[UpdateReport, WeightSnapshot]:
        """Return the weights as they are."""
        snapshot = self._learner.weights()
        return UpdateReport({}, snapshot.policy_version, snapshot.checksum), snapshot

    def save(self, path: str) -> None:
        """Write the policy and its value head; loadable by `AutoModelForCausalLM.from_pretrained`."""
        self._learner.save(Path(path))

    def close(self) -> None:
        """Nothing to free; the group ends the process."""


class LearnerGroup:
    """The learner; what the loop calls `learner`."""

    def __init__(self, config: Config, trajectories: Path) -> None:
        """Create the worker; `setup` loads its models. `trajectories` is the folder for the Parquet files."""
        self._config, self._trajectories = config, trajectories
        self._group = ActorGroup(LearnerWorker, learner_spec(config), config.ray.call_timeout_s)

    def setup(self) -> list[dict[str, float]]:
        """Load policy and reference, and wait until they are ready."""
        return self._group.setup(self._config.ray.start_timeout_s, self._config)

    def update(self, scored: Shards, step: int) -> Update:
        """Make one PPO update on all scored shards; waits for it."""
        figures = scored.wait()
        path = self._trajectories / f"step-{step:05d}.parquet"
        answer = self._group.handles[0].update.remote(step, str(path), *scored.tables)
        metrics, weights = self._published("updating", answer)
        return Update(figures | metrics, weights)

    def step(
        self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float
    ) -> tuple[LearnerStep, PublishedWeights]:
        """Make one PPO update on a table of one's own; waits for it. The loop calls `update`."""
        report, snapshot = self._group.handles[0].step.remote(table, step, orders, kl_coef)
        (done,) = self._group.wait("updating", [report])
        return done, PublishedWeights(done.policy_version, done.checksum, snapshot)

    def fetch_weights(self, weights: PublishedWeights) -> WeightSnapshot:
        """Bring published weights here."""
        return ray.get(weights.snapshot, timeout=self._config.ray.call_timeout_s)

    def weights(self) -> PublishedWeights:
        """Publish the weights as they are."""
        return self._published("publishing weights", self._group.handles[0].weights.remote())[1]

    def save(self, path: Path) -> None:
        """Write the policy to a folder."""
        self._group.call("saving", lambda handle: handle.save.remote(str(path)))

    def close(self) -> None:
        """End the worker."""
        self._group.close()

    def _published(self, doing: str, answer: tuple[Any, Any]) -> tuple[dict[str, float], PublishedWeights]:
        report, snapshot = answer
        (report,) = self._group.wait(doing, [report])
        return report.metrics, PublishedWeights(report.policy_version, report.checksum, snapshot)


def write_trajectories(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    pq.write_table(table, aside, compression="zstd")
    aside.replace(path)
