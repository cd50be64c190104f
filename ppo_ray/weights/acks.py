"""The driver's record of weights: version and checksum, where they are, and who acknowledged them."""

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
    """Of all tensors, each verified on arrival."""
    seconds: float
    """From the call to the verified or published weights."""


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
