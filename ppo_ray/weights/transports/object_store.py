"""Weights through Ray's object store: works everywhere, between any numbers of learners, engines and nodes.

Each bucket is an object that the driver owns: it outlives the learner's process, is pulled once a node, however many
engines are there, and stays for engines that come late.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.config import Config
from ppo_ray.errors import WorkerLost
from ppo_ray.weights.acks import PublishedWeights, WeightAck


class Fetched(Sequence[np.ndarray]):
    """Buckets that come from the object store when they are asked for, while those behind are on their way already."""

    def __init__(self, references: Sequence[Any], timeout_s: float) -> None:
        """Let the node pull all of them, without waiting; `timeout_s` is the longest wait for one."""
        self._references, self._timeout_s = list(references), timeout_s
        if self._references:
            ray.wait(self._references, num_returns=len(self._references), timeout=0)

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: Any) -> Any:
        return ray.get(self._references[index], timeout=self._timeout_s)


class ObjectStoreTransport:
    """A `WeightTransport`: every engine fetches for itself."""

    def __init__(self, config: Config) -> None:
        """Take the time limits of a run."""
        self._timeout_s = config.ray.call_timeout_s

    def send(self, weights: PublishedWeights, engines: ActorGroup) -> list[WeightAck]:
        """Send weights to all engines; see `WeightTransport.send`."""
        try:
            return engines.call("loading weights", lambda handle: _load(handle, weights), may_stop=False)
        except DependencyLost as error:
            raise _weights_lost(error) from error

    def send_to(self, weights: PublishedWeights, engines: ActorGroup, engine: Member) -> WeightAck:
        """Send weights to one engine; see `WeightTransport.send_to`."""
        answer = _load(engine.handle, weights)
        try:
            engines.watch({answer: engine}, "loading weights", may_stop=False)
        except DependencyLost as error:
            raise _weights_lost(error) from error
        return ray.get(answer, timeout=self._timeout_s)


def _load(handle: Any, weights: PublishedWeights) -> Any:
    # The buckets in a list: Ray fetches arguments before a call begins, and what lies inside them not at all.
    return handle.load_weights.remote(weights.manifest, list(weights.buckets))


def _weights_lost(error: DependencyLost) -> WorkerLost:
    return WorkerLost(f"the weights that engines were to load are gone with the learner's node: {error}", "learner-0")
