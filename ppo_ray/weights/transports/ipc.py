"""Weights by CUDA IPC, where every engine shares its GPU with a learner rank, by vLLM's weight-transfer API.

Nothing is sent: each rank tells by which handles its memory is mapped, and every engine takes what is on its own GPU.
"""

from collections.abc import Sequence
from typing import Any

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import Member
from ppo_ray.config import Config
from ppo_ray.weights.acks import PublishedWeights, WeightAck


def merged(exports: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return, for each tensor, its handles on all GPUs, of what every learner rank exports of its own.

    Args:
        exports: a list a rank, in which each tensor has its handle under the GPU's UUID.
    """
    return [
        {gpu: handle for of_rank in tensor for gpu, handle in of_rank.items()} for tensor in zip(*exports, strict=True)
    ]


class IPCTransport:
    """A `WeightTransport`: the learner's memory is lent to the engines until they have read it."""

    def __init__(self, config: Config) -> None:
        """Take the time limits of a run."""
        self._limit_s = config.ray.transfer_timeout_s

    def send(self, weights: PublishedWeights, engines: ActorGroup) -> list[WeightAck]:
        """Send weights to all engines; see `WeightTransport.send`."""
        handles = self._exported(weights, engines)
        acks = engines.call(
            "mapping weights by CUDA IPC",
            lambda handle: handle.receive_weights.remote(weights.manifest, *handles),
            may_stop=False,
        )
        self._released(weights, engines)
        return acks

    def send_to(self, weights: PublishedWeights, engines: ActorGroup, engine: Member) -> WeightAck:
        """Send weights to one engine; see `WeightTransport.send_to`."""
        handles = self._exported(weights, engines)
        call = engine.handle.receive_weights.remote(weights.manifest, *handles)
        (ack,) = engines.gather({call: engine}, "mapping weights by CUDA IPC", self._limit_s)
        self._released(weights, engines)
        return ack

    def _exported(self, weights: PublishedWeights, engines: ActorGroup) -> list[Any]:
        answers = [rank.handle.export_weights.remote(weights.policy_version) for rank in weights.ranks]
        done = dict(zip([done for done, _ in answers], weights.ranks, strict=True))
        engines.gather(done, "exporting weights by CUDA IPC", self._limit_s)
        return [handles for _, handles in answers]

    def _released(self, weights: PublishedWeights, engines: ActorGroup) -> None:
        calls = {rank.handle.release_weights.remote(): rank for rank in weights.ranks}
        engines.gather(calls, "releasing weights", self._limit_s)
