"""A group of like actors: launch, call, wait with a limit, close."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from ppo_ray import trajectory
from ppo_ray.actors.placement import ActorSpec
from ppo_ray.errors import PPORayError, WorkerError

_POLL_S = 1.0  # signal handlers run between polls
_CLOSE_S = 20.0


@dataclass(frozen=True)
class Shards:
    """Trajectories on their way: references, in order, to tables that the driver never fetches."""

    doing: str
    """What their workers do, for errors."""
    tables: list[Any]
    """A reference a shard."""
    figures: list[tuple[str, Any]]
    """A worker's name and a reference to what it measured, a shard."""
    timeout_s: float
    source: "Shards | None" = None
    """What these were made of."""

    def wait(self) -> dict[str, float]:
        """Wait until all are there; returns their sources' figures and their own.

        A worker's seconds add up, and the slowest worker's count. Sources are waited for first, so that an error names
        the worker that failed and not the one that was waiting for it.

        Raises:
            WorkerError: as `wait_for`.
        """
        figures = self.source.wait() if self.source else {}
        answers = wait_for(
            {f"{name} (shard {i})": ref for i, (name, ref) in enumerate(self.figures)}, self.timeout_s, self.doing
        )
        by_worker: dict[tuple[str, str], float] = defaultdict(float)
        for (name, _), answer in zip(self.figures, answers, strict=True):
            for key, value in answer.items():
                by_worker[key, name] += value
        for (key, _), value in by_worker.items():
            figures[key] = max(value, figures.get(key, 0.0))
        return figures

    def fetch(self) -> pa.Table:
        """Wait for all and bring them here, in order: for a caller that must see trajectories; the loop never does."""
        self.wait()
        return trajectory.concat(ray.get(self.tables, timeout=self.timeout_s))


@dataclass(frozen=True)
class PublishedWeights:
    """Weights in the object store: their name, and a reference to a snapshot that the driver never fetches."""

    policy_version: int
    checksum: str
    snapshot: Any


class ActorGroup:
    """Like actors under one name: `rollout-0`, `rollout-1`, ...

    The actors are light to construct; `setup` does the heavy work, so that what fails there keeps its own error.
    """

    def __init__(self, actor_class: Any, spec: ActorSpec, call_timeout_s: float) -> None:
        """Create the actors without waiting for them; `actor_class` is a Ray actor class taking the worker's name."""
        self.names = [f"{spec.key}-{index}" for index in range(spec.workers)]
        self.handles = [actor_class.options(**spec.options(name)).remote(name) for name in self.names]
        self._call_timeout_s = call_timeout_s

    def setup(self, timeout_s: float, *args: Any) -> list[Any]:
        """Set up all actors at once and wait until each is ready."""
        refs = [handle.setup.remote(*args) for handle in self.handles]
        return wait_for(dict(zip(self.names, refs, strict=True)), timeout_s, "starting")

    def call(self, doing: str, call: Callable[[Any], Any]) -> list[Any]:
        """Make the same call on all actors and wait for their answers; `doing` says what they do, for errors."""
        refs = [call(handle) for handle in self.handles]
        return wait_for(dict(zip(self.names, refs, strict=True)), self._call_timeout_s, doing)

    def deal(self, doing: str, calls: list[Callable[[Any], Any]], source: "Shards | None" = None) -> "Shards":
        """Make calls that return (table, figures), the i-th on worker `i % len(names)`, without waiting."""
        pairs = [call(self.handles[index % len(self.handles)]) for index, call in enumerate(calls)]
        names = [self.names[index % len(self.names)] for index in range(len(pairs))]
        tables, figures = zip(*pairs, strict=True)
        return Shards(doing, list(tables), list(zip(names, figures, strict=True)), self._call_timeout_s, source)

    def wait(self, doing: str, refs: list[Any]) -> list[Any]:
        """Wait for answers of the first worker."""
        return wait_for({f"{self.names[0]} (call {i})": ref for i, ref in enumerate(refs)}, self._call_timeout_s, doing)

    def close(self) -> None:
        """Ask every actor to close and end its process; one that does not answer in time is killed. Never raises."""
        refs = [handle.close.remote() for handle in self.handles]
        ray.wait(refs, num_returns=len(refs), timeout=_CLOSE_S, fetch_local=False)
        for handle in self.handles:
            ray.kill(handle, no_restart=True)
        self.handles = []


def wait_for(refs: Mapping[str, Any], timeout_s: float, doing: str) -> list[Any]:
    """Wait for named answers, in order, at most `timeout_s` seconds in all.

    The first failure ends the wait at once, whoever else is still at work.

    Raises:
        PPORayError: a worker raised it itself.
        WorkerError: a worker raised something else, died, or was late; the message names it and what it was doing.
    """
    deadline = time.monotonic() + timeout_s
    names = {ref: name for name, ref in refs.items()}
    waiting = list(names)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S, fetch_local=False)
        for ref in done:
            _raise_failure(ref, names[ref], doing)
        if waiting and time.monotonic() > deadline:
            late = ", ".join(names[ref] for ref in waiting)
            raise WorkerError(
                f"{doing}: no answer from {late} within {timeout_s:g} s; see its log in Ray's session folder, or raise "
                "ray.call_timeout_s (ray.start_timeout_s while starting)"
            )
    return ray.get(list(refs.values()), timeout=max(1.0, deadline - time.monotonic()))


def _raise_failure(ref: Any, name: str, doing: str) -> None:
    """Raise what went wrong with an answer that is there; a large answer is not fetched for it."""
    try:
        ray.get(ref, timeout=60)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PPORayError):
            raise type(cause)(f"{name}, {doing}: {cause}") from error
        raise WorkerError(f"{name} failed while {doing}: {type(cause).__name__}: {cause}\n{error}") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(f"{name} was lost while {doing}: {error}") from error
