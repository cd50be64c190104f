"""Records of published weights and of their acknowledgements, for the driver."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ppo_ray.errors import WorkerError


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that a learner has published: version, checksum, and references that the driver never fetches."""

    policy_version: int
    checksum: str
    manifest: Any
    """Reference to a `WeightManifest`."""
    buckets: tuple[Any, ...] = ()
    """References to the buckets of a snapshot; none where the weights stay on the learner's GPU."""
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
