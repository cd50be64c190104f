"""The learner's actors: shells over `PPOLearner`, one a rank.

Weights are returned, each bucket as an object of its own, and so owned by the caller: they outlive the learner.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ppo_ray import atomic, trajectory
from ppo_ray import checkpoint as checkpoints
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.checkpoint import RunState
from ppo_ray.config import Config
from ppo_ray.errors import CheckpointError, NonFiniteError, WorkerError
from ppo_ray.learner.batch import check_staleness
from ppo_ray.learner.probe import Agreement
from ppo_ray.learner.publisher import WeightSender
from ppo_ray.weights.manifest import WeightManifest

if TYPE_CHECKING:
    from ppo_ray.learner import learner
    from ppo_ray.learner.ranks import Meeting


@dataclass(frozen=True)
class UpdateReport:
    """What the driver learns of an update: figures, and the name of the new weights. Never the weights."""

    metrics: dict[str, float]
    policy_version: int
    checksum: str
    """Of all weights, also where this rank holds a share of them."""


@dataclass(frozen=True)
class LearnerStep:
    """An update in full, for a caller that works with trajectories itself."""

    update: "learner.Update"
    kl_coef: float
    """Of the next update."""
    value_head: dict[str, np.ndarray]
    policy_version: int
    checksum: str


Publication = tuple["UpdateReport | LearnerStep", WeightManifest, *tuple[np.ndarray | None, ...]]
"""A report, what the weights consist of, and their `num_buckets` buckets; callers set `num_returns` to 2 + that."""


@ray.remote(concurrency_groups=CONTROL)
class LearnerWorker(Worker):
    """Holds the policy that is trained: one of the ranks that do it together, or the only one.

    All ranks get the same calls in the same order; what is one for all (weights, files) is the first one's alone.
    """

    def open_meeting(self, host: str, timeout_s: float) -> "Meeting":
        """Open the place where the ranks meet, on an address of this node."""
        from ppo_ray.learner.ranks import open_meeting

        meeting, self._store = open_meeting(host, timeout_s)
        return meeting

    def read(self, file: str) -> str | None:
        """Return what is in a small text file; None if this node does not see it."""
        return Path(file).read_text(encoding="utf-8") if Path(file).is_file() else None

    def setup(
        self, config: Config, checkpoint: str | None = None, meeting: "Meeting | None" = None, rank: int = 0
    ) -> dict[str, float]:
        """Join the other ranks and load policy and reference, or a checkpoint; returns the seconds it took."""
        import torch

        from ppo_ray.learner.learner import PPOLearner
        from ppo_ray.learner.ranks import Ranks, join
        from ppo_ray.models.loading import default_device

        start = time.perf_counter()
        torch.set_num_threads(config.learner.threads)
        self._leads, ranks = rank == 0, Ranks()
        self._shares_gpu = config.ray.placement == "colocated"
        self._sender = WeightSender(config, self._leads)
        if meeting is not None:
            backend = "nccl" if default_device().type == "cuda" else "gloo"  # Ray's GPUs may be but a number
            limits = config.ray.start_timeout_s, config.ray.call_timeout_s
            ranks = join(meeting, rank, config.learner.workers, backend, *limits)
        self._learner = PPOLearner.load(
            config.model,
            config.ppo,
            config.learner,
            temperature=config.rollout.temperature,
            seed=config.seed,
            num_steps=config.steps,
            ranks=ranks,
            checkpoint=None if checkpoint is None else Path(checkpoint),
        )
        self._max_staleness = config.rollout.max_staleness
        self._held: pa.Table | None = None
        if self._max_staleness and checkpoint is not None:
            self._held = pq.read_table(Path(checkpoint) / checkpoints.AHEAD)
        return {"time/learner_start_s": time.perf_counter() - start}

    def num_buckets(self) -> int:
        """Return how many buckets the weights are published in."""
        return self._sender.num_buckets(self._learner)

    def hold(self, *shards: pa.Table) -> None:
        """Keep the next update's trajectories, scored: they are part of the learner's state from now on."""
        self._held = trajectory.concat(shards).combine_chunks()  # as it would come out of a checkpoint

    def update(self, step: int, path: str, *shards: pa.Table) -> Publication:
        """Make one PPO update on all shards together; write the trajectories and what was learnt of them to `path`.

        Args:
            step: of the run.
            path: a Parquet file.
            shards: of trajectories, scored; none: those that are held.

        Raises:
            WorkerError: a loss or gradient is not finite, and the mini-batch that made it is written beside `path`; or
                a trajectory is staler than it may be.
            PeersLost: another rank is gone.
        """
        start = time.perf_counter()
        table, self._held = trajectory.concat(shards) if shards else self._held, None
        figures = check_staleness(table, self._learner.policy_version, self._max_staleness)
        try:
            update = self._learner.update(table, step)
        except NonFiniteError as error:
            dump = Path(path).with_name(f"{Path(path).stem}-nonfinite.parquet")
            if self._leads:
                write_trajectories(dump, error.trajectories)
            raise WorkerError(f"{error} The mini-batch that made it is in {dump}.") from error
        if self._leads:
            write_trajectories(Path(path), update.trajectories)
        report, *weights = self._published(update.metrics | figures)
        report.metrics["time/learn_s"] = time.perf_counter() - start
        return report, *weights

    def step(self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float) -> Publication:
        """Make one PPO update with the caller's order of rows and KL coefficient; returns all that is known of it."""
        self._learner.controller = replace(self._learner.controller, kl_coef=kl_coef)
        update = self._learner.update(table, step, orders.__getitem__)
        report, *weights = self._published({})
        names = report.policy_version, report.checksum
        return LearnerStep(update, self._learner.kl_coef, self._learner.value_head(), *names), *weights

    def weights(self) -> Publication:
        """Return the weights as they are."""
        return self._published({})

    def moved_weights(self) -> Publication:
        """Return weights that differ from the policy's, for a check of the engines; the policy stays as it is."""
        with self._learner.probe(self._sender.wire).moved():
            return self._published({}, passing=True)

    def join_transfers(self, group_id: str | None, world_size: int = 0) -> str:
        """Meet engines in a NCCL group; without an id, return a new one."""
        from ppo_ray.weights.nccl_sender import new_group_id

        if group_id is None:
            return new_group_id()
        self._sender.join(group_id, world_size)
        return group_id

    def send_weights(self, policy_version: int) -> None:
        """Broadcast the weights that were published last; see `WeightSender.send`."""
        self._sender.send(policy_version)

    @ray.method(num_returns=2)
    def export_weights(self, policy_version: int) -> tuple[None, list[dict[str, Any]]]:
        """Return what engines on the same GPU map the published weights by; see `WeightSender.export`."""
        return None, self._sender.export(policy_version)

    def release_weights(self) -> None:
        """Let go of what engines have read; answers when all calls before are done."""
        self._sender.release()

    @ray.method(concurrency_group="control")
    def abort_transfer(self) -> None:
        """End a broadcast that waits for an engine in vain."""
        self._sender.abort()

    def compare(self, *shards: pa.Table) -> list[Agreement]:
        """Compare what engines generated with those weights with what the learner computes."""
        agreements = self._learner.probe(self._sender.wire).compare(trajectory.concat(shards))
        self._rest()
        return agreements

    def save(self, path: str, state: RunState, config: str) -> None:
        """Write a checkpoint of the run; the first rank writes what all give.

        Raises:
            CheckpointError: it cannot be written, or the learner is not where the run is.
        """
        if self._learner.policy_version != state.step:
            raise CheckpointError(
                f"the learner has made {self._learner.policy_version} updates, the run {state.step} steps: not saved"
            )
        if self._max_staleness and self._held is None:
            raise CheckpointError("the learner does not hold the next step's trajectories yet: not saved")
        learner = self._learner.gathered()

        def write(folder: Path) -> None:
            learner.write(folder)
            if self._held is not None:
                write_trajectories(folder / checkpoints.AHEAD, self._held)

        if self._leads:
            checkpoints.write(Path(path), state, config, write)

    def close(self) -> None:
        """Leave the other ranks."""
        from ppo_ray.learner.ranks import leave

        leave()

    def _published(self, metrics: dict[str, float], passing: bool = False) -> tuple[Any, ...]:
        self._rest()
        start = time.perf_counter()
        manifest, buckets = self._sender.publish(self._learner, passing)
        metrics = metrics | {"time/publish_s": time.perf_counter() - start}
        return UpdateReport(metrics, manifest.policy_version, manifest.checksum), manifest, *buckets

    def _rest(self) -> None:
        """Give back what torch keeps of freed GPU memory: the engine that shares the GPU is about to wake."""
        if self._shares_gpu:
            import torch

            torch.cuda.empty_cache()


def write_trajectories(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all, onto the disk."""
    atomic.write(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
