"""The learner's actor: a shell over `PPOLearner`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ppo_ray import checkpoint as checkpoints
from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import learner_spec
from ppo_ray.actors.shards import Shards
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.agreement import Agreement
from ppo_ray.checkpoint import Pending, RunState
from ppo_ray.config import Config
from ppo_ray.errors import CheckpointError, NonFiniteError, WorkerError, WorkerLost
from ppo_ray.events import Report
from ppo_ray.weights import PublishedWeights, WeightSnapshot

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


@ray.remote(concurrency_groups=CONTROL)
class LearnerWorker(Worker):
    """Holds the policy that is trained."""

    def setup(self, config: Config, checkpoint: str | None = None) -> dict[str, float]:
        """Load policy and reference, or a checkpoint; returns the seconds it took."""
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
            checkpoint=None if checkpoint is None else Path(checkpoint),
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

    @ray.method(num_returns=2)
    def moved_weights(self) -> tuple[UpdateReport, WeightSnapshot]:
        """Return weights that differ from the policy's, for a check of the engines; the policy stays as it is."""
        snapshot = self._learner.probe().moved_weights()
        return UpdateReport({}, snapshot.policy_version, snapshot.checksum), snapshot

    def compare(self, *shards: pa.Table) -> list[Agreement]:
        """Compare what engines generated with those weights with what the learner computes."""
        return self._learner.probe().compare(trajectory.concat(shards))

    def save(self, path: str, state: RunState, config: str) -> None:
        """Write a checkpoint of the run.

        Raises:
            CheckpointError: it cannot be written, or the learner is not where the run is.
        """
        if self._learner.policy_version != state.step:
            raise CheckpointError(
                f"the learner has made {self._learner.policy_version} updates, the run {state.step} steps: not saved"
            )
        checkpoints.write(Path(path), state, config, self._learner.save)


class LearnerGroup:
    """The learner; what the loop calls `learner`."""

    def __init__(self, config: Config, trajectories: Path, report: Report) -> None:
        """Create the worker; `setup` loads its models. `trajectories` is the folder for the Parquet files."""
        self._config, self._trajectories = config, trajectories
        self._group = ActorGroup(LearnerWorker, learner_spec(config), config.ray, report)

    def setup(self, checkpoint: Path | None = None) -> list[dict[str, float]]:
        """Load policy and reference, or go on from a checkpoint, and wait until they are ready."""
        return self._group.setup(self._config, _text(checkpoint))

    def rebuild(self, lost: WorkerLost, checkpoint: Path | None) -> None:
        """Put another worker in the place of a lost one, with the state of a checkpoint, or as the run began.

        Raises:
            WorkerError: it was lost too often in a row.
        """
        self._group.setup_args = (self._config, _text(checkpoint))
        self._group.revive(lost)

    def update(self, scored: Shards, step: int) -> Update:
        """Make one PPO update on all scored shards; waits for it, whatever signal comes.

        Raises:
            WorkerLost: the learner died or hangs; its state is gone.
            WorkerError: as `watch`.
        """
        path = self._trajectories / f"step-{step:05d}.parquet"

        def update(tables: list[Any]) -> tuple[dict[str, float], PublishedWeights]:
            return self._published("updating", self._handle.update.remote(step, str(path), *tables))

        figures = scored.wait()  # which a signal may end; from the update on, none does
        metrics, weights = scored.use(update)
        return Update(figures | metrics, weights)

    def step(
        self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float
    ) -> tuple[LearnerStep, PublishedWeights]:
        """Make one PPO update on a table of one's own; waits for it. The loop calls `update`."""
        report, snapshot = self._handle.step.remote(table, step, orders, kl_coef)
        done = self._group.answer("updating", report, may_stop=False)
        return done, PublishedWeights(done.policy_version, done.checksum, snapshot)

    def fetch_weights(self, weights: PublishedWeights) -> WeightSnapshot:
        """Bring published weights here."""
        return ray.get(weights.snapshot, timeout=self._config.ray.call_timeout_s)

    def weights(self) -> PublishedWeights:
        """Publish the weights as they are."""
        return self._published("publishing weights", self._handle.weights.remote())[1]

    def moved_weights(self) -> PublishedWeights:
        """Publish weights that differ from the policy's, for a check of the engines."""
        return self._published("publishing weights for a check", self._handle.moved_weights.remote())[1]

    def compare(self, generated: Shards) -> list[Agreement]:
        """Compare what every engine generated with those weights with what the learner computes."""
        return generated.use(lambda tables: self._group.answer("comparing", self._handle.compare.remote(*tables)))

    def save(self, path: Path, state: RunState, config: str) -> Pending:
        """Begin to write a checkpoint; the learner's next call waits until it is written, nobody else does.

        Returns:
            What waits for it.
        """
        ref = self._handle.save.remote(str(path), state, config)
        return lambda: self._group.answer(f"writing {path.name}", ref, may_stop=False)

    def close(self) -> None:
        """End the worker."""
        self._group.close()

    @property
    def _handle(self) -> Any:
        return self._group.members[0].handle

    def _published(self, doing: str, answer: tuple[Any, Any]) -> tuple[dict[str, float], PublishedWeights]:
        ref, snapshot = answer
        report = self._group.answer(doing, ref, may_stop=False)
        return report.metrics, PublishedWeights(report.policy_version, report.checksum, snapshot)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def write_trajectories(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    pq.write_table(table, aside, compression="zstd")
    aside.replace(path)
