"""How published weights reach the engines, as the driver directs it: one interface, three ways."""

from typing import Protocol

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import Member
from ppo_ray.config import Config, weight_transport
from ppo_ray.weights.acks import PublishedWeights, WeightAck


class WeightTransport(Protocol):
    """Brings weights to engines and returns their word for it; it is for the caller to check that word."""

    def send(self, weights: PublishedWeights, engines: ActorGroup) -> list[WeightAck]:
        """Send weights to all engines at once; one that is lost meanwhile is replaced, and its successor gets them too.

        Raises:
            WorkerError: an engine failed, was lost too often, or got a damaged tensor.
            WorkerLost: the learner is gone, and with it the weights.
        """
        ...

    def send_to(self, weights: PublishedWeights, engines: ActorGroup, engine: Member) -> WeightAck:
        """Send weights to an engine that has just taken another's place.

        Raises:
            WorkerError: as `send`.
            WorkerLost: the engine, or the learner, is gone.
        """
        ...


def make_transport(config: Config) -> WeightTransport:
    """Return the transport of a run."""
    name = weight_transport(config)
    if name == "nccl":
        from ppo_ray.weights.transports.nccl import NCCLTransport

        return NCCLTransport(config)
    if name == "ipc":
        from ppo_ray.weights.transports.ipc import IPCTransport

        return IPCTransport(config)
    from ppo_ray.weights.transports.object_store import ObjectStoreTransport

    return ObjectStoreTransport(config)
