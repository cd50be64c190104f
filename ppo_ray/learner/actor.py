"""The learner's actor: a shell over `PPOLearner`, one per rank."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ppo_ray import atomic, trajectory
from ppo_ray import checkpoint as checkpoints
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.checkpoint import FileSums, RunState
from ppo_ray.config import Config
from ppo_ray.errors import CheckpointError, NonFiniteError, WorkerError
from ppo_ray.learner.publisher import WeightPublisher
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.weights.acks import Agreement, WeightAck
from ppo_ray.weights.snapshot import Buffers

if TYPE_CHECKING:
    from ppo_ray.learner.ranks import Rendezvous
    from ppo_ray.learner.snapshot import LearnerSnapshot


@ray.remote(concurrency_groups=CONTROL | {"files": 1})
class LearnerWorker(Worker):
    """One rank of the learner, or the only one.

    All ranks get the same calls in the same order. The first rank alone publishes weights and writes trajectories; a
    checkpoint is written by all ranks, while they may be at other work.
    """

    def __init__(self, name: str) -> None:
        """Take the worker's name."""
        super().__init__(name)
        self._taken: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # what `save` leaves to `write`
        self._written = threading.Event()  # whether nothing is left

    def open_rendezvous(self, host: str, timeout_s: float) -> "Rendezvous":
        """Open the rendezvous of all ranks on an address of this node."""
        from ppo_ray.learner.ranks import open_rendezvous

        rendezvous, self._store = open_rendezvous(host, timeout_s)
        return rendezvous

    def sees(self, file: str, text: str) -> bool:
        """Say whether this node sees a small text file with this content."""
        return Path(file).is_file() and Path(file).read_text(encoding="utf-8") == text

    def setup(
        self, config: Config, checkpoint: str | None = None, rendezvous: "Rendezvous | None" = None, rank: int = 0
    ) -> dict[str, float]:
        """Join the other ranks and load policy and reference, or a checkpoint; returns the seconds it took."""
        import torch

        from ppo_ray.learner.learner import PPOLearner
        from ppo_ray.learner.ranks import Ranks, join
        from ppo_ray.models.loading import check_gpu, default_device

        start = time.perf_counter()
        check_gpu("learner.gpus", config.learner.gpus)
        torch.set_num_threads(config.learner.threads)
        torch.backends.cuda.enable_cudnn_sdp(False)  # vLLM does so once NCCL sends the weights: the same kernels always
        self._leads, ranks = rank == 0, Ranks()
        self._shares_gpu = config.ray.placement == "colocated"
        self._publisher, self._moved = WeightPublisher(config, self._leads), contextlib.ExitStack()
        self._buffers = Buffers() if default_device().type == "cuda" else None  # of checkpoints
        self._written.set()
        if rendezvous is not None:
            backend = "nccl" if default_device().type == "cuda" else "gloo"  # Ray's GPUs may be but a number
            limits = config.ray.start_timeout_s, config.ray.call_timeout_s
            ranks = join(rendezvous, rank, config.learner.workers, backend, *limits)
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
        self._max_staleness, self._rollout = config.rollout.max_staleness, config.rollout
        self._sources = config.prompts.kept_sources
        self._held: pa.Table | None = None
        if self._max_staleness and checkpoint is not None:
            from ppo_ray.learner.state import read_ahead

            self._held = read_ahead(Path(checkpoint))
        return {"time/learner_start_s": time.perf_counter() - start}

    def num_buckets(self) -> int:
        """Return the number of buckets that `publish` returns."""
        return self._publisher.num_buckets(self._learner)

    def hold(self, *shards: pa.Table) -> None:
        """Keep the next update's scored trajectories as part of the learner's state."""
        self._held = trajectory.concat(shards).combine_chunks()  # as it is read from a checkpoint

    def update(self, step: int, path: str, *shards: pa.Table, num_refilled: int = 0) -> UpdateReport:
        """Make one PPO update on all shards together; write the trajectories and what was learned of them to `path`.

        Args:
            step: of the run.
            path: a Parquet file.
            shards: of trajectories, scored; none: those that are held.
            num_refilled: prompts that were taken in the place of flat groups.

        Returns:
            The report without trajectories and mini-batches: a few floats.

        Raises:
            WorkerError: a loss or gradient is not finite, and the mini-batch that made it is written beside `path`; or
                a trajectory is staler than it may be.
            PeersLost: another rank is gone.
        """
        from ppo_ray.learner.metrics import check_staleness, summarize_sources

        self._settle()
        start = time.perf_counter()
        table, self._held = trajectory.concat(shards) if shards else self._held, None
        assert table is not None
        metrics = check_staleness(table, self._learner.policy_version, self._max_staleness)
        metrics |= summarize_sources(table, self._sources)
        metrics["prompts/num_skipped"] = (
            self._rollout.num_prompts + num_refilled - table.num_rows / self._rollout.responses_per_prompt
        )
        try:
            report = self._learner.update(table, step, drop_flat=self._rollout.flat_groups != "keep")
        except NonFiniteError as error:
            dump = Path(path).with_name(f"{Path(path).stem}-nonfinite.parquet")
            if self._leads:
                write_trajectories(dump, error.trajectories)
            raise WorkerError(f"{error} The mini-batch that made it is in {dump}.") from error
        if self._leads:
            write_trajectories(Path(path), report.trajectories)
        metrics = report.metrics | metrics | self.measure_memory() | {"time/learn_s": time.perf_counter() - start}
        return replace(report, metrics=metrics, trajectories=None, minibatches=())

    def step(self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float) -> UpdateReport:
        """Make one PPO update with the caller's order of rows and KL coefficient; returns the full report."""
        self._settle()
        self._learner.controller = replace(self._learner.controller, kl_coef=kl_coef)
        return self._learner.update(table, step, orders.__getitem__)

    def measure_kl(self, *shards: pa.Table) -> float:
        """Return the KL to the reference of what the policy answered; see `PPOLearner.measure_kl`."""
        found = self._learner.measure_kl(trajectory.concat(shards))
        self._rest()
        return found

    def value_head(self) -> dict[str, np.ndarray]:
        """Return a copy of the value head; see `PPOLearner.value_head`."""
        return self._learner.value_head()

    def publish(self, moved: bool = False) -> Iterator[Any]:
        """Make the weights ready to be sent to engines.

        Args:
            moved: send weights that differ from the policy's, for a check of the engines. Where weights stay on the
                GPU until they are sent, the policy has them until the next call of `compare`, `publish` or `update`.

        Yields:
            `num_buckets` buckets, each None but on the first rank; a `WeightManifest`; and a `WeightAck` of this rank.
            All buckets are in the same memory: Ray copies one into its store before it asks for the next. The caller
            sets `num_returns` to `num_buckets` + 2: it owns each bucket as an object, which so outlives the learner.
        """
        start = time.perf_counter()
        self._settle()
        self._rest()
        if moved:
            self._moved.enter_context(self._learner.probe(self._publisher.wire).move())
        manifest, agreed = yield from self._publisher.publish(self._learner)
        if self._publisher.copies:
            self._settle()
        yield manifest
        seconds = time.perf_counter() - start
        yield WeightAck(self._name, manifest.policy_version, manifest.checksum, seconds, agreed)

    def join_transfers(self, group_id: str | None, world_size: int = 0) -> str:
        """Join a NCCL group with engines; without an id, return a new one."""
        from ppo_ray.weights.nccl_sender import new_group_id

        if group_id is None:
            return new_group_id()
        self._publisher.join(group_id, world_size)
        return group_id

    def send_weights(self, policy_version: int) -> None:
        """Broadcast the weights that were published last; see `WeightPublisher.send`."""
        self._publisher.send(policy_version)

    @ray.method(num_returns=2)
    def export_weights(self, policy_version: int, bucket: int) -> tuple[int, dict[str, Any]]:
        """Lend a bucket of the published weights to engines on the same GPU; see `WeightPublisher.export`."""
        return self._publisher.export(policy_version, bucket)

    def release_weights(self) -> None:
        """Free what engines have read; returns when all earlier calls are done."""
        self._publisher.release()

    @ray.method(concurrency_group="control")
    def abort_transfer(self, group_id: str) -> None:
        """End a meeting or a broadcast of a NCCL group that waits in vain for an engine."""
        self._publisher.abort(group_id)

    def compare(self, *shards: pa.Table) -> list[Agreement]:
        """Compare the engines' log-probabilities of what they generated with the learner's; see `WeightProbe`."""
        self._settle()
        agreements = self._learner.probe(self._publisher.wire).compare(trajectory.concat(shards))
        self._rest()
        return agreements

    def save(self, path: str, aside: str, state: RunState, config: str) -> None:
        """Take what a checkpoint of the run holds into host memory, for the next call of `write`; all ranks do.

        Args:
            path: of the checkpoint.
            aside: where the ranks write it until it is whole.
            state: of the run.
            config: YAML of it.

        Raises:
            CheckpointError: the learner is not where the run is.
            PeersLost: another rank is gone.
        """
        write = None  # where there is no snapshot, this call says why
        self._written.clear()
        try:
            snapshot, held = self._take_snapshot(state), self._held

            def save_learner(folder: Path) -> FileSums:
                sums = snapshot.write(folder)
                if held is not None and self._leads:
                    write_trajectories(folder / checkpoints.AHEAD, held)
                return sums

            write = partial(checkpoints.write, Path(path), state, config, save_learner, Path(aside), self._leads)
        finally:
            self._taken.put(write)

    @ray.method(concurrency_group="files")
    def write(self) -> None:
        """Write the checkpoint that `save` has taken, or is taking; called once for each of its calls.

        Raises:
            CheckpointError: a rank cannot write it.
            PeersLost: another rank is gone.
        """
        write = self._taken.get()
        try:
            if write is not None:
                write()
        finally:
            self._written.set()

    def _take_snapshot(self, state: RunState) -> "LearnerSnapshot":
        """Take the learner's state; raises as `save`."""
        if self._learner.policy_version != state.step:
            raise CheckpointError(
                f"the learner has made {self._learner.policy_version} updates, the run {state.step} steps: not saved"
            )
        if self._max_staleness and self._held is None:
            raise CheckpointError("the learner does not hold the next step's trajectories yet: not saved")
        snapshot = self._learner.take_snapshot(self._buffers)
        self._rest()
        return snapshot

    def close(self) -> None:
        """Leave the other ranks."""
        from ppo_ray.learner.ranks import leave

        leave()

    def _settle(self) -> None:
        """Put the policy's own weights back, if a check has moved them; let what is written of the state be written."""
        self._moved.close()
        if self._buffers is None:
            self._written.wait()

    def _rest(self) -> None:
        """Return torch's cached GPU memory to the engine that shares the GPU and is about to wake."""
        if self._shares_gpu:
            import torch

            torch.cuda.empty_cache()


def write_trajectories(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    atomic.write(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
