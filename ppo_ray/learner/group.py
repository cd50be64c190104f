"""All ranks of the learner as the driver sees them: what the loop calls `learner`.

Ranks stand and fall together: when one is lost, all are replaced and restored from a checkpoint.
"""

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ppo_ray import atomic
from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.placement import Seats
from ppo_ray.actors.shards import Rounds, Shards
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.checkpoint import Pending, RunState
from ppo_ray.config import Config
from ppo_ray.errors import InputError, PeersLost, WorkerError, WorkerLost
from ppo_ray.events import ActorReport, Event, Report
from ppo_ray.learner.actor import LearnerWorker
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.plan import ActorSpec
from ppo_ray.plan.demand import CPU_ALLOCATION, actor_specs
from ppo_ray.weights.acks import Agreement, PublishedWeights
from ppo_ray.weights.snapshot import WeightSnapshot

if TYPE_CHECKING:
    from ppo_ray.learner.ranks import Rendezvous

_SOON_S = 30.0  # Ray needs most of it to notice that a node is gone
_OF_RANKS = ("time/", "memory/")  # how the metrics begin that each rank has its own of


def learner_spec(config: Config) -> ActorSpec:
    """Return the resources of the learner; on a CPU its environment holds `CPU_ALLOCATION`."""
    environment = {} if config.learner.gpus else CPU_ALLOCATION
    return replace(actor_specs(config)["learner"], environment=environment, modules=("ppo_ray.learner.learner",))


class LearnerGroup:
    """The learner, of one rank or several."""

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
            report: is called with every replacement.
            seats: where they are placed; None: Ray decides.
            worker: the actors' class.
        """
        self._config, self._trajectories, self._report = config, trajectories, report
        self._group = ActorGroup(worker, learner_spec(config), config.ray, report, seats)
        self._held: tuple[dict[str, float], dict[str, ActorReport]] = ({}, {})
        self._num_buckets = 0
        self._buckets: list[Any] = []  # of the weights that were published last
        self.last_update: UpdateReport | None = None
        """Of the newest update of these workers; None before the first."""

    def setup(self, checkpoint: Path | None = None) -> list[dict[str, float]]:
        """Load policy and reference, or a checkpoint, and wait until all ranks are ready.

        Raises:
            InputError: a rank's node does not see the run's folder.
            WorkerError: a rank failed to start, or was lost too often in a row.
        """
        self._held, self.last_update = ({}, {}), None
        while True:
            try:
                return self._set_up(checkpoint)
            except WorkerLost as lost:
                self._group.launch_again(lost)

    def rebuild(self, lost: WorkerLost, checkpoint: Path | None) -> None:
        """Replace the workers of all ranks and restore a checkpoint, or begin as the run began.

        Raises:
            WorkerError: as `setup`.
        """
        began = time.monotonic()
        self._group.launch_again(lost)
        self.setup(checkpoint)
        seconds = time.monotonic() - began
        self._report(Event("worker_replaced", f"{lost.name} was replaced in {seconds:.1f} s: {lost}", lost.name))

    def update(self, scored: Shards | Rounds, step: int) -> UpdateReport:
        """Make one PPO update on all scored shards; waits for it, and no signal ends the wait.

        Returns:
            The report, with the metrics of generation and scoring too.

        Raises:
            WorkerLost: a rank died or hangs; the learner's state is gone.
            WorkerError: as `watch`.
        """
        metrics = scored.wait()  # which a signal may end; from the update on, none does
        return scored.use(lambda tables: self._update(step, tables, metrics, scored.actors))

    def hold(self, scored: Shards, may_stop: bool = False) -> None:
        """Hand the next update's shards to all ranks, and wait until they hold them.

        From then on they are part of the learner's state: saved with it, restored with it. Until then the engines must
        keep the weights that sample them, so that what is lost can be sampled again. The seconds of the wait are a
        metric of that update, `time/wait_s`.

        Args:
            scored: the shards.
            may_stop: whether a request to stop the run ends the wait.

        Raises:
            WorkerLost: a rank died or hangs; the learner's state is gone.
            WorkerError: as `watch`.
        """

        def hand_over(tables: list[Any]) -> None:
            calls = {rank.handle.hold.remote(*tables): rank for rank in self._group.members}
            self._group.watch(calls, "taking the next trajectories", may_stop=False)

        began = time.monotonic()
        metrics = scored.wait(may_stop)
        scored.use(hand_over, may_stop)
        self._held = metrics | {"time/wait_s": time.monotonic() - began}, scored.actors

    def update_held(self, step: int) -> UpdateReport:
        """Make one PPO update on the shards that the ranks hold; otherwise as `update`."""
        return self._update(step, [], *self._held)

    def step(self, table: pa.Table, step: int, orders: list[np.ndarray], kl_coef: float) -> UpdateReport:
        """Make one PPO update on a table of the caller's; returns the full report. The loop calls `update`."""
        shared = ray.put(table)
        calls = {rank.handle.step.remote(shared, step, orders, kl_coef): rank for rank in self._group.members}
        return self._wait("updating", calls)[0]

    def value_head(self) -> dict[str, np.ndarray]:
        """Return a copy of the value head; see `PPOLearner.value_head`."""
        return self._wait("copying", {rank.handle.value_head.remote(): rank for rank in self._group.members})[0]

    def publish(self, moved: bool = False) -> PublishedWeights:
        """Drop the weights before, and publish the new, by version and checksum, for `RolloutGroup.load_weights`.

        Args:
            moved: publish weights that differ from the policy's, for a check of the engines.

        Raises:
            WorkerLost: a rank died or hangs; the learner's state is gone.
            WorkerError: ranks hold different weights.
        """
        began, ranks = time.monotonic(), self._group.members
        self._buckets.clear()  # no engine needs them again: all that they sampled is with the learner
        answers = [rank.handle.publish.options(num_returns=self._num_buckets + 2).remote(moved) for rank in ranks]
        acks = self._wait("publishing weights", dict(zip([ack for *_, ack in answers], ranks, strict=True)))
        for ack in acks:
            if (ack.policy_version, ack.agreed) != (acks[0].policy_version, acks[0].agreed):
                raise WorkerError(
                    f"{ack.worker} holds policy version {ack.policy_version} (checksum {ack.agreed}) and "
                    f"{acks[0].worker} version {acks[0].policy_version} (checksum {acks[0].agreed}): the ranks "
                    "no longer train the same policy"
                )
        *self._buckets, manifest, _ = answers[0]
        names, seconds = (acks[0].policy_version, acks[0].checksum), time.monotonic() - began
        return PublishedWeights(*names, manifest, self._buckets, tuple(ranks), seconds)

    def fetch_weights(self, weights: PublishedWeights) -> WeightSnapshot:
        """Fetch published weights from the object store into this process."""
        manifest, *buckets = ray.get([weights.manifest, *weights.buckets], timeout=self._config.ray.call_timeout_s)
        return WeightSnapshot(manifest, tuple(buckets))

    def compare(self, generated: Shards) -> list[Agreement]:
        """Compare every engine's log-probabilities of what it generated with the learner's; see `WeightProbe`."""
        return self._ask_of(generated, "comparing", lambda handle, tables: handle.compare.remote(*tables))

    def measure_kl(self, generated: Shards) -> float:
        """Return the KL to the reference of what the policy answered; see `PPOLearner.measure_kl`."""
        return self._ask_of(generated, "measuring the KL", lambda handle, tables: handle.measure_kl.remote(*tables))

    def save(self, path: Path, state: RunState, config: str) -> Pending:
        """Begin to write a checkpoint; a learner on GPUs goes on when its state is copied, on CPUs when it is written.

        What the one before has begun must be done: the ranks copy into the same memory.
        """
        ranks, aside = self._group.members, str(atomic.name_aside(path))
        calls = {rank.handle.save.remote(str(path), aside, state, config): rank for rank in ranks}
        calls |= {rank.handle.write.remote(): rank for rank in ranks}
        wait = partial(self._wait, f"writing {path.name}", calls)
        return Pending(wait, lambda: not ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)[1])

    def close(self) -> None:
        """End the workers."""
        self._group.close()

    def _update(
        self, step: int, tables: list[Any], metrics: dict[str, float], actors: dict[str, ActorReport]
    ) -> UpdateReport:
        assert self._trajectories is not None
        path = str(self._trajectories / f"step-{step:05d}.parquet")
        options = {"num_refilled": int(metrics["groups/num_refilled"])} if "groups/num_refilled" in metrics else {}
        calls = {rank.handle.update.remote(step, path, *tables, **options): rank for rank in self._group.members}
        reports = self._wait("updating", calls)
        for rank, report in zip(self._group.members, reports, strict=True):
            own = {name: value for name, value in report.metrics.items() if name.startswith(_OF_RANKS)}
            actors = actors | {rank.name: ActorReport(rank.host, own)}
        self.last_update = replace(reports[0], metrics=metrics | _merge_ranks(reports), actors=actors)
        return self.last_update

    def _set_up(self, checkpoint: Path | None) -> list[dict[str, float]]:
        if self._trajectories is not None:
            self._check_shared(self._trajectories.parent)
        rendezvous, text = self._open_rendezvous(), None if checkpoint is None else str(checkpoint)
        given, ranks = (self._config, text, rendezvous), enumerate(self._group.members)
        calls = {member.handle.setup.remote(*given, rank): member for rank, member in ranks}
        doing = "starting and compiling layers (learner.compile)" if self._config.learner.compile else "starting"
        answers, leader = self._wait_start(calls, doing), self._group.members[0]
        self._num_buckets = self._wait_start({leader.handle.num_buckets.remote(): leader})[0]
        return answers

    def _check_shared(self, folder: Path) -> None:
        """Refuse a folder that a rank's node does not see: the run would lose what the rank writes there."""
        marker, text = folder / ".shared", secrets.token_hex(8)
        marker.write_text(text, encoding="utf-8")
        try:
            seen = self._wait_start({rank.handle.sees.remote(str(marker), text): rank for rank in self._group.members})
        finally:
            marker.unlink(missing_ok=True)
        for rank, sees in zip(self._group.members, seen, strict=True):
            if not sees:
                (place,) = self._wait_start({rank.handle.whereabouts.remote(): rank})
                raise InputError(
                    f"output_dir={folder}: {rank.name} ({place}) does not see this folder, and it is the learner that "
                    "writes trajectories and checkpoints; give a folder that all nodes share"
                )

    def _open_rendezvous(self) -> "Rendezvous | None":
        """Let the first rank open the rendezvous: on its loopback where all ranks are on one node."""
        if len(self._group.members) == 1:
            return None
        places = self._wait_start({member.handle.whereabouts.remote(): member for member in self._group.members})
        nodes, leader = tuple(place.node for place in places), self._group.members[0]
        host = "127.0.0.1" if len(set(nodes)) == 1 else nodes[0]
        opened = {leader.handle.open_rendezvous.remote(host, self._config.ray.start_timeout_s): leader}
        return replace(self._wait_start(opened)[0], nodes=nodes)

    def _ask_of(self, generated: Shards, doing: str, call: Callable[[Any, list[Any]], Any]) -> Any:
        """Let all ranks answer a call on generated shards, and return the first one's answer."""
        ranks = self._group.members
        return generated.use(lambda tables: self._wait(doing, {call(rank.handle, tables): rank for rank in ranks})[0])

    def _wait(self, doing: str, calls: dict[Any, Member]) -> list[Any]:
        """Wait for calls, which no signal ends, and return their answers."""
        _find_lost(calls, lambda some: self._group.watch(some, doing, may_stop=False))
        return ray.get(list(calls), timeout=self._config.ray.call_timeout_s)

    def _wait_start(self, calls: dict[Any, Member], doing: str = "starting") -> list[Any]:
        _find_lost(calls, lambda some: self._group.watch_start(some, doing))
        return ray.get(list(calls), timeout=self._config.ray.start_timeout_s)


def _find_lost(calls: dict[Any, Member], wait: Callable[[dict[Any, Member]], None]) -> None:
    """Wait for ranks; where one reports that it lost touch with another, find out which one is gone.

    If a rank cannot begin because the trajectories were lost with a node, the ranks that did begin wait for it in vain.
    So does a rank whose own peers are there and have given up; it is not waited for.

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
        for ref in ray.wait(list(calls), num_returns=len(calls), timeout=_SOON_S, fetch_local=False)[0]:
            with contextlib.suppress(PeersLost):
                wait({ref: calls[ref]})
        raise WorkerLost(str(error), next(iter(calls.values())).name) from error


def _merge_ranks(reports: list[UpdateReport]) -> dict[str, float]:
    """Return the first rank's metrics, which all ranks share, with the most of all ranks' seconds and memory."""
    return {
        name: max(report.metrics[name] for report in reports) if name.startswith(_OF_RANKS) else value
        for name, value in reports[0].metrics.items()
    }
