"""The learner as the driver sees it: one rank or several, which stand and fall together."""

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import Seats
from ppo_ray.actors.shards import Shards
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.checkpoint import Pending, RunState
from ppo_ray.config import Config
from ppo_ray.errors import InputError, PeersLost, WorkerError, WorkerLost
from ppo_ray.events import Event, Report
from ppo_ray.learner.actor import LearnerStep, LearnerWorker
from ppo_ray.learner.probe import Agreement
from ppo_ray.plan import ActorSpec
from ppo_ray.plan.demand import CPU_ALLOCATION, actor_specs
from ppo_ray.weights.acks import PublishedWeights
from ppo_ray.weights.snapshot import WeightSnapshot

if TYPE_CHECKING:
    from ppo_ray.learner.ranks import Meeting


def learner_spec(config: Config) -> ActorSpec:
    """Return what the learner needs; on a CPU it allocates as `CPU_ALLOCATION` says."""
    environment = {} if config.learner.gpus else CPU_ALLOCATION
    return replace(actor_specs(config)["learner"], environment=environment)


@dataclass(frozen=True)
class Update:
    """An update as the driver sees it."""

    metrics: dict[str, float]
    """Of generation, scoring and learning."""
    weights: PublishedWeights


class LearnerGroup:
    """The learner, of one rank or several; what the loop calls `learner`."""

    def __init__(
        self,
        config: Config,
        trajectories: Path | None,
        report: Report,
        seats: Seats | None = None,
        worker: Any = LearnerWorker,
    ) -> None:
        """Create the workers; `setup` loads their models.

        Args:
            config: of the run.
            trajectories: folder of the Parquet files, in the run's own; None: nothing is to be updated.
            report: is told of every replacement.
            seats: where they go; None: where Ray likes.
            worker: the actors' class.
        """
        self._config, self._trajectories, self._report = config, trajectories, report
        self._group = ActorGroup(worker, learner_spec(config), config.ray, report, seats)
        self._held_figures: dict[str, float] = {}
        self._num_buckets = 0

    def setup(self, checkpoint: Path | None = None) -> list[dict[str, float]]:
        """Load policy and reference, or go on from a checkpoint, and wait until all ranks are ready.

        Raises:
            InputError: a rank's node does not see the run's folder.
            WorkerError: a rank failed to start, or was lost too often in a row.
        """
        self._held_figures = {}
        while True:
            try:
                return self._set_up(checkpoint)
            except WorkerLost as lost:
                self._group.launch_again(lost)

    def rebuild(self, lost: WorkerLost, checkpoint: Path | None) -> None:
        """Put other workers in the place of all ranks, with the state of a checkpoint, or as the run began.

        Raises:
            WorkerError: as `setup`.
        """
        began = time.monotonic()
        self._group.launch_again(lost)
        self.setup(checkpoint)
        seconds = time.monotonic() - began
        self._report(Event("worker_replaced", f"{lost.name} was replaced in {seconds:.1f} s: {lost}", lost.name))

    def update(self, scored: Shards, step: int) -> Update:
        """Make one PPO update on all scored shards; waits for it, whatever signal comes.

        Raises:
            WorkerLost: a rank died or hangs; the learner's state is gone.
            WorkerError: as `watch`, or ranks hold different weights.
        """
        figures = scored.wait()  # which a signal may end; from the update on, none does
        done = scored.use(lambda tables: self._updated(step, tables))
        return Update(figures | done.metrics, done.weights)

    def hold(self, scored: Shards, may_stop: bool = False) -> dict[str, float]:
        """Hand the next update's shards to all ranks, and wait until they hold them.

        From then on they are part of the learner's state: saved with it, restored with it. Until then the engines must
        keep the weights that sample them, so that what is lost can be made again.

        Args:
            scored: the shards.
            may_stop: whether a request to stop the run ends the wait.

        Returns:
            The seconds that were waited (`time/wait_s`).

        Raises:
            WorkerLost: a rank died or hangs; the learner's state is gone.
            WorkerError: as `watch`.
        """

        def hand_over(tables: list[Any]) -> None:
            calls = {rank.handle.hold.remote(*tables): rank for rank in self._group.members}
            self._group.watch(calls, "taking the next trajectories", may_stop=False)

        began = time.monotonic()
        self._held_figures = scored.wait(may_stop)
        scored.use(hand_over, may_stop)
        return {"time/wait_s": time.monotonic() - began}

    def update_held(self, step: int) -> Update:
        """Make one PPO update on what the ranks hold; as `update`."""
        done = self._updated(step, [])
        return Update(self._held_figures | done.metrics, done.weights)

    def step(
        self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float
    ) -> tuple[LearnerStep, PublishedWeights]:
        """Make one PPO update on a table of one's own; waits for it. The loop calls `update`."""
        shared = ray.put(table)
        (done, *_), weights = self._published("updating", lambda rank: rank.step, shared, step, orders, kl_coef)
        return done, weights

    def fetch_weights(self, weights: PublishedWeights) -> WeightSnapshot:
        """Bring published weights here, from the object store."""
        manifest, *buckets = ray.get([weights.manifest, *weights.buckets], timeout=self._config.ray.call_timeout_s)
        return WeightSnapshot(manifest, tuple(buckets))

    def weights(self) -> PublishedWeights:
        """Publish the weights as they are."""
        return self._published("publishing weights", lambda rank: rank.weights)[1]

    def moved_weights(self) -> PublishedWeights:
        """Publish weights that differ from the policy's, for a check of the engines."""
        return self._published("publishing weights for a check", lambda rank: rank.moved_weights)[1]

    def compare(self, generated: Shards) -> list[Agreement]:
        """Compare what every engine generated with those weights with what the learner computes."""
        ranks = self._group.members
        return generated.use(
            lambda tables: self._answers(
                "comparing", {member.handle.compare.remote(*tables): member for member in ranks}
            )[0]
        )

    def save(self, path: Path, state: RunState, config: str) -> Pending:
        """Begin to write a checkpoint; the learner's next call waits until it is written, nobody else does.

        Returns:
            What waits for it.
        """
        calls = {member.handle.save.remote(str(path), state, config): member for member in self._group.members}

        def wait() -> None:
            self._answers(f"writing {path.name}", calls)

        return wait

    def close(self) -> None:
        """End the workers."""
        self._group.close()

    def _updated(self, step: int, tables: list[Any]) -> Update:
        assert self._trajectories is not None
        path = self._trajectories / f"step-{step:05d}.parquet"
        began = time.monotonic()
        reports, weights = self._published("updating", lambda rank: rank.update, step, str(path), *tables)
        metrics = _slowest([report.metrics for report in reports])
        # and what the call took beyond the learner's own work: as it returns, weights go into the object store
        metrics["time/publish_s"] += time.monotonic() - began - metrics["time/learn_s"]
        return Update(metrics, weights)

    def _set_up(self, checkpoint: Path | None) -> list[dict[str, float]]:
        if self._trajectories is not None:
            self._check_shared(self._trajectories.parent)
        meeting, text = self._meeting(), None if checkpoint is None else str(checkpoint)
        calls = {
            member.handle.setup.remote(self._config, text, meeting, rank): member
            for rank, member in enumerate(self._group.members)
        }
        answers, leader = self._started(calls), self._group.members[0]
        self._num_buckets = self._started({leader.handle.num_buckets.remote(): leader})[0]
        return answers

    def _check_shared(self, folder: Path) -> None:
        """Refuse a folder that a rank's node does not see: what the rank wrote there would be lost to the run."""
        marker, text = folder / ".shared", secrets.token_hex(8)
        marker.write_text(text, encoding="utf-8")
        try:
            found = self._started({rank.handle.read.remote(str(marker)): rank for rank in self._group.members})
        finally:
            marker.unlink(missing_ok=True)
        for rank, content in zip(self._group.members, found, strict=True):
            if content != text:
                (place,) = self._started({rank.handle.whereabouts.remote(): rank})
                raise InputError(
                    f"output_dir={folder}: {rank.name} ({place}) does not see this folder, and it is the learner that "
                    "writes trajectories and checkpoints; give a folder that all nodes share"
                )

    def _meeting(self) -> "Meeting | None":
        """Let the first rank open the place where all meet: on its loopback where all are on one node."""
        if len(self._group.members) == 1:
            return None
        places = self._started({member.handle.whereabouts.remote(): member for member in self._group.members})
        nodes, leader = [place.node for place in places], self._group.members[0]
        host = "127.0.0.1" if len(set(nodes)) == 1 else nodes[0]
        return self._started({leader.handle.open_meeting.remote(host, self._config.ray.start_timeout_s): leader})[0]

    def _published(
        self, doing: str, method: Callable[[Any], Any], *arguments: Any
    ) -> tuple[list[Any], PublishedWeights]:
        """Call a method of all ranks, taken of an actor's handle, that returns a report and, on the first, weights."""
        asked = self._group.members
        returns = 2 + self._num_buckets
        answers = [method(member.handle).options(num_returns=returns).remote(*arguments) for member in asked]
        reports = self._answers(doing, dict(zip([report for report, *_ in answers], asked, strict=True)))
        for member, report in zip(asked, reports, strict=True):
            if (report.policy_version, report.checksum) != (reports[0].policy_version, reports[0].checksum):
                raise WorkerError(
                    f"{member.name} holds policy version {report.policy_version} (checksum {report.checksum}) and "
                    f"{asked[0].name} version {reports[0].policy_version} (checksum {reports[0].checksum}): the ranks "
                    "no longer train the same policy"
                )
        _, manifest, *buckets = answers[0]
        names = reports[0].policy_version, reports[0].checksum
        return reports, PublishedWeights(*names, manifest, tuple(buckets), tuple(asked))

    def _answers(self, doing: str, calls: dict[Any, Member]) -> list[Any]:
        """Wait for calls whose work is not thrown away, and return their answers."""
        _find_lost(calls, lambda some: self._group.watch(some, doing, may_stop=False))
        return ray.get(list(calls), timeout=self._config.ray.call_timeout_s)

    def _started(self, calls: dict[Any, Member]) -> list[Any]:
        _find_lost(calls, self._group.watch_start)
        return ray.get(list(calls), timeout=self._config.ray.start_timeout_s)


def _find_lost(calls: dict[Any, Member], wait: Callable[[dict[Any, Member]], None]) -> None:
    """Wait for ranks; where one says that it lost touch with another, find out which of them is gone.

    Where one cannot begin because its node took the trajectories along, those that did begin wait for it in vain.

    Raises:
        WorkerLost: names the rank that is gone, or one that cannot reach the others.
    """
    try:
        wait(calls)
    except DependencyLost as error:
        if len(calls) == 1:
            raise
        raise WorkerLost(str(error), next(iter(calls.values())).name) from error
    except PeersLost as error:
        for ref, member in calls.items():
            with contextlib.suppress(PeersLost):
                wait({ref: member})
        raise WorkerLost(str(error), next(iter(calls.values())).name) from error


def _slowest(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Return the first rank's figures, which are those of all, and the longest of all ranks' seconds."""
    return {
        name: max(rank[name] for rank in metrics) if name.startswith("time/") else value
        for name, value in metrics[0].items()
    }
