"""Tables that workers make one of another, as ordered references; tables lost with a worker are made again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.errors import WorkerLost
from ppo_ray.events import ActorReport

_ONCE = {"time/publish_s", "time/sync_s"}  # of the weights, which all rounds of a step have
_MAX_REMADE = 5  # times that tables are made again because they were lost with a node

ShardCall = Callable[[Any, Any], tuple[Any, Any]]
"""Takes an actor's handle and the source's table (None without a source); returns references to a table and to metrics
of the call: its seconds (`time/...`) and the actor's memory (`memory/...`)."""

Answer = TypeVar("Answer")


class Shards:
    """Tables that workers make: table i by worker i modulo their number, from table i of the source.

    The calls are kept. Each is a function of its arguments alone: repeated on any worker, it makes the same table.
    """

    def __init__(
        self,
        group: ActorGroup,
        doing: str,
        calls: list[ShardCall],
        timeout_s: float,
        source: "Shards | None" = None,
        metrics: Mapping[str, float] | None = None,
        of_workers: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Make all calls at once, without waiting.

        Args:
            group: whose workers are called.
            doing: what they do, for errors.
            calls: one per shard.
            timeout_s: longest fetch of the tables.
            source: the tables they work on; None: they need none.
            metrics: known beforehand, to be returned by `wait` with the others.
            of_workers: metrics of single workers that are known beforehand, by their names, for `actors`.
        """
        self._group, self._doing, self._calls, self._source = group, doing, calls, source
        self._timeout_s, self._metrics, self._of_workers = timeout_s, dict(metrics or {}), of_workers or {}
        self._reports: dict[str, ActorReport] = {}
        self.tables: list[Any] = [None] * len(calls)
        """References, which the driver never fetches."""
        self._seconds: list[Any] = [None] * len(calls)
        """References to the metrics of the calls, which arrive with the tables."""
        self._inputs: list[Any] = [None] * len(calls)
        self._arrived: set[Any] = set()
        """Those of `_seconds` that are known to have arrived."""
        for index in range(len(calls)):
            self._submit(index)

    def wait(self, may_stop: bool = True) -> dict[str, float]:
        """Wait until all tables are made; returns the source's metrics and their own.

        The seconds of one worker's calls add up, and of all workers the slowest counts. The source is waited for first,
        so that an error names the worker that failed and not the one that was waiting for it.

        Args:
            may_stop: whether a request to stop the run ends the wait.

        Raises:
            WorkerError: a worker failed, or was lost too often.
        """
        for attempt in range(_MAX_REMADE + 1):
            metrics = self._source.wait(may_stop) if self._source else {}
            try:
                self._wait_for_own(may_stop)
                return metrics | self._metrics | self._slowest_worker(metrics)
            except DependencyLost:
                if self._source is None or attempt == _MAX_REMADE:
                    raise
                self._source.remake()
        raise AssertionError

    @property
    def actors(self) -> dict[str, ActorReport]:
        """What each worker did for these tables and for the source's, by its name; known after `wait`."""
        return (self._source.actors if self._source else {}) | self._reports

    def remake(self) -> None:
        """Make all tables again from the beginning: some were lost with their node."""
        if self._source is not None:
            self._source.remake()
        for index in range(len(self._calls)):
            self._submit(index)

    def use(self, consume: Callable[[list[Any]], Answer], may_stop: bool = True) -> Answer:
        """Wait for all tables and pass their references on; if they are lost before they are read, make them again."""
        for _ in range(_MAX_REMADE):
            self.wait(may_stop)
            try:
                return consume(self.tables)
            except DependencyLost:
                self.remake()
        self.wait(may_stop)
        return consume(self.tables)

    def fetch(self) -> pa.Table:
        """Wait for all tables and fetch them in order, for a caller that needs the trajectories; the loop does not."""
        self.wait()
        return trajectory.concat(ray.get(self.tables, timeout=self._timeout_s))

    def _submit(self, index: int) -> None:
        self._inputs[index] = self._source.tables[index] if self._source else None
        handle = self._member(index).handle
        self.tables[index], self._seconds[index] = self._calls[index](handle, self._inputs[index])

    def _member(self, index: int) -> Member:
        return self._group.members[index % len(self._group.members)]

    def _wait_for_own(self, may_stop: bool) -> None:
        for index in range(len(self._calls)):
            if self._source and self._inputs[index] is not self._source.tables[index]:
                self._submit(index)  # its source was made again
        while True:
            try:
                calls = {
                    ref: self._member(index) for index, ref in enumerate(self._seconds) if ref not in self._arrived
                }
                self._group.watch(calls, self._doing, may_stop)
                self._arrived = set(self._seconds)
                return
            except WorkerLost as lost:
                self._group.revive(lost, may_stop)
                for index, ref in enumerate(self._seconds):
                    if self._member(index).name == lost.name and not _has_arrived(ref):
                        self._submit(index)

    def _slowest_worker(self, source_metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the seconds of the slowest worker and the memory of the largest, those of the source included."""
        members = [self._member(index) for index in range(len(self._seconds))]
        found: dict[str, dict[str, float]] = {member.name: {} for member in members}
        for member, answer in zip(members, ray.get(self._seconds, timeout=self._timeout_s), strict=True):
            for name in answer:
                if not name.startswith(("time/", "memory/")):
                    raise ValueError(f"{member.name} reports {name}: only time/... and memory/... are merged")
            found[member.name] = _add_up(found[member.name], answer)
        hosts = {member.name: member.host for member in members}
        self._reports = {
            name: ActorReport(hosts[name], {**self._of_workers.get(name, {}), **own}) for name, own in found.items()
        }
        worst: dict[str, float] = {}
        for own in found.values():
            for name, value in own.items():
                worst[name] = max(value, worst.get(name, source_metrics.get(name, 0.0)))
        return worst


class Rounds:
    """The tables of several `Shards`, made one after the other, as if they were of one."""

    def __init__(self, rounds: Sequence[Shards], metrics: Mapping[str, float]) -> None:
        """Take the rounds in their order, at least one, and metrics to be returned by `wait` with theirs."""
        self._rounds, self._metrics = rounds, dict(metrics)

    def wait(self, may_stop: bool = True) -> dict[str, float]:
        """Wait until all tables are made; the seconds of the rounds add up. Otherwise as `Shards.wait`."""
        first, *others = (one.wait(may_stop) for one in self._rounds)
        for metrics in others:
            first = _add_up(first, metrics)
        return first | self._metrics

    @property
    def actors(self) -> dict[str, ActorReport]:
        """What each worker did in all rounds, by its name; known after `wait`."""
        joined: dict[str, ActorReport] = {}
        for one in self._rounds:
            for name, report in one.actors.items():
                before = joined.get(name)
                metrics = _add_up(before.metrics, report.metrics) if before else report.metrics
                joined[name] = ActorReport(report.host, metrics)
        return joined

    def use(self, consume: Callable[[list[Any]], Answer], may_stop: bool = True) -> Answer:
        """Wait for all tables and pass their references on, in order; otherwise as `Shards.use`."""
        for attempt in range(_MAX_REMADE + 1):
            self.wait(may_stop)
            try:
                return consume([table for one in self._rounds for table in one.tables])
            except DependencyLost:
                if attempt == _MAX_REMADE:
                    raise
                for one in self._rounds:
                    one.remake()
        raise AssertionError


def _add_up(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Join metrics of work done in turn: seconds add up, but those of the weights; of memory the most counts."""
    joined = dict(first)
    for name, value in second.items():
        if name.startswith("memory/"):
            joined[name] = max(value, first.get(name, 0.0))
        elif name not in _ONCE:
            joined[name] = value + first.get(name, 0.0)
    return joined


def _has_arrived(ref: Any) -> bool:
    """Say whether an answer has arrived and is no error."""
    if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(ref, timeout=60)
    except ray.exceptions.RayError:
        return False
    return True
