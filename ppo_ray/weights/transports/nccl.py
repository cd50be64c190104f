"""Weights by NCCL from the learner's GPU to the engines', by vLLM's weight-transfer API.

The first learner rank is rank 0 of a group; the GPUs of the engines are the ranks from 1 on. A broadcast cannot be
taken back: if one of the group is lost in it, the others wait for ever. So the driver, which watches all of them, ends
it: it aborts the learner's part, and replaces every engine that was in it, for none of them can use what it has got.
The group is made anew whenever its members are others than the last time.
"""

from typing import Any

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import Member
from ppo_ray.config import Config
from ppo_ray.errors import PPORayError, WorkerLost
from ppo_ray.weights.acks import PublishedWeights, WeightAck
from ppo_ray.weights.wire import NUM_BUFFERS


def engine_init(group_id: str, first_rank: int, world_size: int, buffer_bytes: int) -> dict[str, Any]:
    """Return what vLLM's NCCL backend needs to join a group, an engine's first GPU as `first_rank`."""
    return {
        "nccl_unique_id_b64": group_id,
        "rank_offset": first_rank,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": NUM_BUFFERS,
    }


class NCCLTransport:
    """A `WeightTransport`: a broadcast, in which all take part at the same time."""

    def __init__(self, config: Config) -> None:
        """Be in no group yet."""
        self._gpus = config.rollout.tensor_parallel
        self._limit_s, self._ping_s = config.ray.transfer_timeout_s, config.ray.ping_timeout_s
        self._buffer_bytes = config.rollout.weight_bucket_mib << 20
        self._connected: list[Member] = []
        self._broken: list[Member] = []

    def send(self, weights: PublishedWeights, engines: ActorGroup) -> list[WeightAck]:
        """Send weights to all engines; see `WeightTransport.send`."""
        ranks = {rank.name for rank in weights.ranks}
        while True:
            while self._broken:
                engine = self._broken.pop()
                if _among(engine, engines.members):
                    lost = f"{engine.name} ({engine.place}) was in a weight sync by NCCL that broke off"
                    engines.revive(WorkerLost(lost, engine.name), may_stop=False)
            try:
                return self._broadcast(weights, engines, list(engines.members))
            except WorkerLost as error:
                if error.name in ranks:
                    raise

    def send_to(self, weights: PublishedWeights, engines: ActorGroup, engine: Member) -> WeightAck:
        """Send weights to one engine, in a group of two; see `WeightTransport.send_to`."""
        return self._broadcast(weights, engines, [engine])[0]

    def _broadcast(self, weights: PublishedWeights, engines: ActorGroup, receivers: list[Member]) -> list[WeightAck]:
        learner = weights.ranks[0]
        try:
            self._connect(learner, engines, receivers)
            calls = {engine.handle.receive_weights.remote(weights.manifest): engine for engine in receivers}
            for rank in weights.ranks:  # all of them: where each holds a share, they gather what the first one sends
                calls[rank.handle.send_weights.remote(weights.policy_version)] = rank
            return engines.gather(calls, "sending weights by NCCL", self._limit_s)[: len(receivers)]
        except PPORayError as error:
            self._connected, self._broken = [], self._broken + receivers
            if not (isinstance(error, WorkerLost) and error.name == learner.name):
                self._free(learner, engines)
            raise

    def _connect(self, learner: Member, engines: ActorGroup, receivers: list[Member]) -> None:
        """Let learner and engines meet, unless they are the very ones that met last."""
        wanted = [learner, *receivers]
        if len(wanted) == len(self._connected) and all(map(_same, wanted, self._connected)):
            return
        self._connected = []
        asked = {learner.handle.join_transfers.remote(None): learner}
        (group_id,) = engines.gather(asked, "preparing a group for NCCL", self._limit_s)
        calls, world_size = {}, 1 + len(receivers) * self._gpus
        for index, engine in enumerate(receivers):
            init = engine_init(group_id, 1 + index * self._gpus, world_size, self._buffer_bytes)
            calls[engine.handle.connect.remote(init)] = engine
        calls[learner.handle.join_transfers.remote(group_id, world_size)] = learner
        engines.gather(calls, "meeting in a group for NCCL", self._limit_s)
        self._connected = wanted

    def _free(self, learner: Member, engines: ActorGroup) -> None:
        """Get the learner out of a broadcast that waits in vain.

        Raises:
            WorkerLost: it does not come out: its state is out of reach.
        """
        doing = "leaving a weight sync by NCCL that broke off"
        for call in (learner.handle.abort_transfer, learner.handle.release_weights):
            engines.gather({call.remote(): learner}, doing, self._ping_s, "ray.ping_timeout_s")


def _same(one: Member, other: Member) -> bool:
    return one is other


def _among(member: Member, members: list[Member]) -> bool:
    return any(member is other for other in members)
