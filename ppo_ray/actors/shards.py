"""Trajectories on their way from worker to worker: references, in order; what a lost worker held is made again."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.errors import WorkerLost

_MAX_REMADE = 5  # times that tables are made again because a node took them along

ShardCall = Callable[[Any, Any], tuple[Any, Any]]
"""Takes an actor's handle and the source's table (None without a source); returns references to a table, to figures."""

Answer = TypeVar("Answer")


class Shards:
    """Tables that workers make, the i-th by worker i modulo their number, each of the i-th of its source.

    The calls are kept: as they are functions of their arguments alone, a call that is made again, on whichever worker,
    makes the same table.
    """

    def __init__(
        self,
        group: ActorGroup,
        doing: str,
        calls: list[ShardCall],
        timeout_s: float,
        source: "Shards | None" = None,
    ) -> None:
        """Make all calls at once, without waiting.

        Args:
            group: whose workers are called.
            doing: what they do, for errors.
            calls: one a shard.
            timeout_s: longest fetch of the tables.
            source: what they work on; None: they begin from nothing.
        """
        self._group, self._doing, self._calls, self._source = group, doing, calls, source
        self._timeout_s = timeout_s
        self.tables: list[Any] = [None] * len(calls)
        """References, which the driver never fetches."""
        self._figures: list[Any] = [None] * len(calls)
        self._inputs: list[Any] = [None] * len(calls)
        self._there: set[Any] = set()
        """Of the figures, those that are known to be there."""
        for index in range(len(calls)):
            self._submit(index)

    def wait(self, may_stop: bool = True) -> dict[str, float]:
        """Wait until all are there; returns their sources' figures and their own.

        A worker's seconds add up, and the slowest worker's count. Sources are waited for first, so that an error names
        the worker that failed and not the one that was waiting for it.

        Args:
            may_stop: whether a request to stop the run ends the wait.

        Raises:
            WorkerError: a worker failed, or was lost too often.
        """
        for attempt in range(_MAX_REMADE + 1):
            figures = self._source.wait(may_stop) if self._source else {}
            try:
                self._wait_for_own(may_stop)
                return self._merged(figures)
            except DependencyLost:
                if self._source is None or attempt == _MAX_REMADE:
                    raise
                self._source.remake()
        raise AssertionError

    def remake(self) -> None:
        """Make all tables again, from the beginning: a node is gone, and what it alone held."""
        if self._source is not None:
            self._source.remake()
        for index in range(len(self._calls)):
            self._submit(index)

    def use(self, consume: Callable[[list[Any]], Answer], may_stop: bool = True) -> Answer:
        """Wait for all tables and hand their references on; if they are lost before they are read, make them again."""
        for _ in range(_MAX_REMADE):
            self.wait(may_stop)
            try:
                return consume(self.tables)
            except DependencyLost:
                self.remake()
        self.wait(may_stop)
        return consume(self.tables)

    def fetch(self) -> pa.Table:
        """Wait for all and bring them here, in order: for a caller that must see trajectories; the loop never does."""
        self.wait()
        return trajectory.concat(ray.get(self.tables, timeout=self._timeout_s))

    def _submit(self, index: int) -> None:
        self._inputs[index] = self._source.tables[index] if self._source else None
        handle = self._member(index).handle
        self.tables[index], self._figures[index] = self._calls[index](handle, self._inputs[index])

    def _member(self, index: int) -> Member:
        return self._group.members[index % len(self._group.members)]

    def _wait_for_own(self, may_stop: bool) -> None:
        for index in range(len(self._calls)):
            if self._source and self._inputs[index] is not self._source.tables[index]:
                self._submit(index)  # its source was made again
        while True:
            try:
                calls = {ref: self._member(index) for index, ref in enumerate(self._figures) if ref not in self._there}
                self._group.watch(calls, self._doing, may_stop)
                self._there = set(self._figures)
                return
            except WorkerLost as lost:
                self._group.revive(lost, may_stop)
                for index, ref in enumerate(self._figures):
                    if self._member(index).name == lost.name and not _is_there(ref):
                        self._submit(index)

    def _merged(self, figures: dict[str, float]) -> dict[str, float]:
        by_worker: dict[tuple[str, str], float] = defaultdict(float)
        for index, answer in enumerate(ray.get(self._figures, timeout=self._timeout_s)):
            for key, value in answer.items():
                by_worker[key, self._member(index).name] += value
        merged = dict(figures)
        for (key, _), value in by_worker.items():
            merged[key] = max(value, merged.get(key, 0.0))
        return merged


def _is_there(ref: Any) -> bool:
    """Say whether an answer is there and is no error."""
    if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(ref, timeout=60)
    except ray.exceptions.RayError:
        return False
    return True
