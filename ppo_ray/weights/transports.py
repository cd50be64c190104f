"""Weight transports: the ways of published weights to the engines, as the driver directs them.

There are three: Ray's object store, which works everywhere; NCCL, from the learner's GPU to the engines' GPUs; and CUDA
IPC, where every engine shares its GPU with a learner rank. The last two use vLLM's weight-transfer API.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import ray

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.config import Config, weight_transport
from ppo_ray.errors import PPORayError, WorkerLost
from ppo_ray.plan.demand import actor_name
from ppo_ray.weights.acks import PublishedWeights, WeightAck
from ppo_ray.weights.snapshot import NUM_BUFFERS


class WeightTransport(Protocol):
    """Sends weights to engines and returns their acknowledgements, which the caller checks."""

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
        return NCCLTransport(config)
    if name == "ipc":
        return IPCTransport(config)
    return ObjectStoreTransport(config)


class ObjectStoreTransport:
    """Weights through Ray's object store, between any numbers of learners, engines and nodes.

    Each bucket is an object that the driver owns. It outlives the learner's process, is pulled once per node, however
    many engines are there, and stays for engines that come late.
    """

    def __init__(self, config: Config) -> None:
        """Take the time limits of a run."""
        self._timeout_s = config.ray.call_timeout_s

    def send(self, weights: PublishedWeights, engines: ActorGroup) -> list[WeightAck]:
        """Send weights to all engines; see `WeightTransport.send`."""
        try:
            return engines.call("loading weights", lambda handle: _load(handle, weights), may_stop=False)
        except DependencyLost as error:
            raise _make_weights_error(error) from error

    def send_to(self, weights: PublishedWeights, engines: ActorGroup, engine: Member) -> WeightAck:
        """Send weights to one engine; see `WeightTransport.send_to`."""
        answer = _load(engine.handle, weights)
        try:
            engines.watch({answer: engine}, "loading weights", may_stop=False)
        except DependencyLost as error:
            raise _make_weights_error(error) from error
        return ray.get(answer, timeout=self._timeout_s)


class RemoteBuckets(Sequence[np.ndarray]):
    """Buckets of the object store, each fetched when it is asked for while the node pulls the next ones."""

    def __init__(self, references: Sequence[Any], timeout_s: float) -> None:
        """Let the node pull all of them, without waiting; `timeout_s` is the longest wait for one."""
        self._references, self._timeout_s = list(references), timeout_s
        if self._references:
            ray.wait(self._references, num_returns=len(self._references), timeout=0)

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: Any) -> Any:
        return ray.get(self._references[index], timeout=self._timeout_s)


def _load(handle: Any, weights: PublishedWeights) -> Any:
    # The buckets in a list: Ray fetches arguments before a call begins, and what lies inside them not at all.
    return handle.load_weights.remote(weights.manifest, list(weights.buckets))


def _make_weights_error(error: DependencyLost) -> WorkerLost:
    message = f"the weights that engines were to load are gone with the learner's node: {error}"
    return WorkerLost(message, actor_name("learner", 0))


class NCCLTransport:
    """Weights by NCCL: a broadcast, in which learner and engines take part at the same time.

    The first learner rank is rank 0 of a group; the GPUs of the engines are the ranks from 1 on. A broadcast cannot be
    taken back: if a member is lost in it, the others wait for ever. So the driver, which watches all of them, ends it:
    it aborts the learner's part, and replaces every engine that was in it, for none of them can use what has arrived.
    The group is made anew whenever its members have changed.
    """

    def __init__(self, config: Config) -> None:
        """Start outside any group."""
        self._gpus = config.rollout.tensor_parallel
        self._limit_s, self._ping_s = config.ray.transfer_timeout_s, config.ray.ping_timeout_s
        self._buffer_bytes = config.rollout.weight_bucket_mib << 20
        self._group_id = ""
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
        """Join learner and engines in a group, unless they are those of the last one."""
        wanted = [learner, *receivers]
        if len(wanted) == len(self._connected) and all(map(_same, wanted, self._connected)):
            return
        self._connected = []
        asked = {learner.handle.join_transfers.remote(None): learner}
        (self._group_id,) = engines.gather(asked, "preparing a group for NCCL", self._limit_s)
        calls, world_size = {}, 1 + len(receivers) * self._gpus
        for index, engine in enumerate(receivers):
            init = engine_init(self._group_id, 1 + index * self._gpus, world_size, self._buffer_bytes)
            calls[engine.handle.connect.remote(init)] = engine
        calls[learner.handle.join_transfers.remote(self._group_id, world_size)] = learner
        engines.gather(calls, "meeting in a group for NCCL", self._limit_s)
        self._connected = wanted

    def _free(self, learner: Member, engines: ActorGroup) -> None:
        """End the learner's part in a meeting or a broadcast that waits in vain.

        Raises:
            WorkerLost: the learner stays in it: its state is out of reach.
        """
        doing, limit = "leaving a weight sync by NCCL that broke off", (self._ping_s, "ray.ping_timeout_s")
        engines.gather({learner.handle.abort_transfer.remote(self._group_id): learner}, doing, *limit)
        engines.gather({learner.handle.release_weights.remote(): learner}, doing, *limit)


def engine_init(group_id: str, first_rank: int, world_size: int, buffer_bytes: int) -> dict[str, Any]:
    """Return the arguments of vLLM's NCCL backend to join a group, an engine's first GPU as `first_rank`."""
    return {
        "nccl_unique_id_b64": group_id,
        "rank_offset": first_rank,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": NUM_BUFFERS,
    }


def _same(one: Member, other: Member) -> bool:
    return one is other


def _among(member: Member, members: list[Member]) -> bool:
    return any(member is other for other in members)


class IPCTransport:
    """Weights by CUDA IPC: each learner rank lends a buffer of its GPU to the engines there, one bucket after another.

    No rank holds more of the model than a bucket beside its own weights. An engine that is lost in a sync does not stop
    the others: they read on, and its successor gets the weights afterwards.
    """

    def __init__(self, config: Config) -> None:
        """Take the time limits of a run."""
        self._limit_s = config.ray.transfer_timeout_s

    def send(self, weights: PublishedWeights, engines: ActorGroup) -> list[WeightAck]:
        """Send weights to all engines; see `WeightTransport.send`."""
        while True:
            acks, lost = self._lend(weights, engines, list(engines.members))
            if not lost:
                return acks
            for error in lost:
                engines.revive(error, may_stop=False)

    def send_to(self, weights: PublishedWeights, engines: ActorGroup, engine: Member) -> WeightAck:
        """Send weights to one engine; see `WeightTransport.send_to`."""
        acks, lost = self._lend(weights, engines, [engine])
        if lost:
            raise lost[0]
        return acks[0]

    def _lend(
        self, weights: PublishedWeights, engines: ActorGroup, readers: list[Member]
    ) -> tuple[list[WeightAck], list[WorkerLost]]:
        """Lend all buckets to some engines; returns the answers to the last one, and which engines were lost."""
        lost: list[WorkerLost] = []
        bucket, num_buckets, acks = 0, 1, []
        while bucket < num_buckets and readers:
            answers = [rank.handle.export_weights.remote(weights.policy_version, bucket) for rank in weights.ranks]
            exported = dict(zip([number for number, _ in answers], weights.ranks, strict=True))
            num_buckets = engines.gather(exported, "lending weights by CUDA IPC", self._limit_s)[0]
            handles = [handle for _, handle in answers]
            calls = {reader.handle.map_weights.remote(weights.manifest, bucket, *handles): reader for reader in readers}
            acks = self._wait(engines, calls, lost)
            readers, bucket = list(calls.values()), bucket + 1
        released = {rank.handle.release_weights.remote(): rank for rank in weights.ranks}
        engines.gather(released, "releasing weights", self._limit_s)
        return acks, lost

    def _wait(self, engines: ActorGroup, calls: dict[Any, Member], lost: list[WorkerLost]) -> list[WeightAck]:
        """Wait until all engines that are left have read a bucket; takes those that are lost out of the calls."""
        while calls:
            try:
                return engines.gather(calls, "mapping weights by CUDA IPC", self._limit_s)
            except WorkerLost as error:
                ours = [call for call, reader in calls.items() if reader.name == error.name]
                if not ours:
                    raise
                del calls[ours[0]]
                lost.append(error)
        return []
