"""Records of published weights, of their acknowledgements and of what engines compute with them, for the driver."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ppo_ray.errors import WorkerError

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest mean difference of log-probabilities, nats per token, by the coarser dtype of both; measured: 1e-5, 0.03."""


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that a learner has published: version, checksum, and references that the driver never fetches."""

    policy_version: int
    checksum: str
    manifest: Any
    """Reference to a `WeightManifest`."""
    buckets: list[Any] = field(default_factory=list)
    """References to the buckets of a snapshot; none where the weights stay on the learner's GPU. The learner's group
    empties the list when it publishes the next weights, so that these take the memory in the store."""
    ranks: tuple[Any, ...] = ()
    """The learner's workers, the first rank first; they send what stays on their GPUs."""
    publish_s: float = 0.0
    """Seconds that publishing took, until the weights were in the object store."""


@dataclass(frozen=True)
class WeightAck:
    """A worker's acknowledgement: an engine serves these weights, or a learner rank has published them."""

    worker: str
    policy_version: int
    checksum: str
    """Checksum of all tensors, each verified on arrival."""
    seconds: float
    """Seconds from the call until the weights were verified or published."""
    agreed: str = ""
    """Of a learner rank: a checksum that all ranks make in the same way, where `checksum` is the first rank's alone."""


@dataclass(frozen=True)
class Agreement:
    """Mean absolute differences between an engine's and the learner's log-probabilities of sampled tokens, in nats."""

    worker: str
    """The rollout worker whose engine it is."""
    to_moved: float
    """Between the engine and the learner under the moved weights, which the engine was sent."""
    to_own: float
    """Between the engine and the learner under its own weights."""
    move: float
    """Between the learner under the two sets of weights: how much there was to see."""

    def problem(self, dtype: str) -> str | None:
        """Say what is wrong with the engine; None if it computes with the weights it was sent.

        Args:
            dtype: the coarser of the engine's and the learner's, `"float32"` or `"bfloat16"`.
        """
        tolerance = _TOLERANCE[dtype]
        seen = f"{self.to_moved:.1e} nats per token off the learner with the weights it was sent"
        if math.isnan(self.to_moved) or self.to_moved > tolerance:
            before = "; it still computes with those before" if self.to_own <= tolerance else ""
            return f"{self.worker} is {seen} (at most {tolerance:g} in {dtype}){before}"
        if self.to_own < 5 * self.to_moved:
            return f"{self.worker} is {seen} and {self.to_own:.1e} off with the ones before: it cannot be told"
        return None


def check_acks(weights: PublishedWeights, acks: Iterable[WeightAck]) -> None:
    """Check that every engine serves the weights that were sent.

    Raises:
        WorkerError: an engine acknowledged another version or checksum; the message names it.
    """
    for ack in acks:
        if (ack.policy_version, ack.checksum) != (weights.policy_version, weights.checksum):
            raise WorkerError(
                f"{ack.worker} serves policy version {ack.policy_version} (checksum {ack.checksum}) after it was sent "
                f"version {weights.policy_version} (checksum {weights.checksum}): its samples would be stale"
            )


def check_agreements(agreements: Iterable[Agreement], dtype: str) -> None:
    """Check that every engine computes with the weights that it was sent.

    Args:
        agreements: of each engine.
        dtype: as in `Agreement.problem`.

    Raises:
        WorkerError: one does not; names it.
    """
    wrong = [problem for agreement in agreements if (problem := agreement.problem(dtype))]
    if wrong:
        raise WorkerError("after new weights " + "; ".join(wrong) + ". Its samples would be of another policy")
