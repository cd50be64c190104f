"""What the driver knows of weights: their name, where they are to be had, and who serves them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ppo_ray.errors import WorkerError


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that a learner has ready: their name, and references that the driver never fetches."""

    policy_version: int
    checksum: str
    manifest: Any
    """Reference to a `WeightManifest`."""
    buckets: tuple[Any, ...] = ()
    """References to the buckets of a snapshot; none where the weights stay on the learner's GPU."""
    ranks: tuple[Any, ...] = ()
    """The learner's workers, the first of which speaks for all: who sends what stays on their GPUs."""


@dataclass(frozen=True)
class WeightAck:
    """An engine's word that it serves weights."""

    worker: str
    policy_version: int
    checksum: str
    """Of the tensors that it received, each checked."""
    load_s: float
    """Seconds from the call to the verified weights in the engine."""


def check_acks(weights: PublishedWeights, acks: Iterable[WeightAck]) -> None:
    """Check that every engine serves the very weights that were sent.

    Raises:
        WorkerError: an engine acknowledged another version or checksum; the message names it.
    """
    for ack in acks:
        if (ack.policy_version, ack.checksum) != (weights.policy_version, weights.checksum):
            raise WorkerError(
                f"{ack.worker} serves policy version {ack.policy_version} (checksum {ack.checksum}) after it was sent "
                f"version {weights.policy_version} (checksum {weights.checksum}): its samples would be stale"
            )
