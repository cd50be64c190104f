"""The learner's end of the weight transports: weights made ready, and sent where they stay on its GPU."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_ray.config import Config, weight_transport
from ppo_ray.errors import InputError, WorkerLost
from ppo_ray.plan.adapters import sends_adapters
from ppo_ray.plan.demand import actor_name
from ppo_ray.weights.checksums import format_sums, word_sums
from ppo_ray.weights.manifest import TensorEntry, WeightManifest
from ppo_ray.weights.snapshot import Buffers, Wire, fill_buckets

if TYPE_CHECKING:
    import torch

    from ppo_ray.learner.learner import PPOLearner
    from ppo_ray.weights.nccl_sender import LentBuffer


class WeightPublisher:
    """One rank's end of the transport. Not thread-safe, except `abort`."""

    def __init__(self, config: Config, leads: bool) -> None:
        """Prepare to publish.

        Args:
            config: of the run.
            leads: whether this is the first rank; the others only describe their weights.

        Raises:
            InputError: the environment sets torch's memory up so that it cannot be lent by CUDA IPC.
        """
        from ppo_ray.weights.nccl_sender import NCCLSender  # loads torch

        self._transport, self._leads = weight_transport(config), leads
        self._adapters_alone = sends_adapters(config)
        for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if self._transport == "ipc" and "expandable_segments:true" in os.environ.get(variable, "").lower():
                raise InputError(
                    f"{variable} has expandable_segments:True, whose memory other processes may not map where ptrace "
                    "is not allowed; unset it, or take rollout.weight_transport=object_store"
                )
        self._wire = Wire(config.rollout.wire_dtype, config.rollout.weight_bucket_mib << 20)
        self._pinned = Buffers() if config.learner.gpus else None  # locked for the GPU, which takes long
        self._sums = bool(config.learner.gpus) and config.learner.workers > 1
        self._manifest: WeightManifest | None = None
        self._learner: PPOLearner | None = None
        self._tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] = list
        self._rest: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._lent: LentBuffer | None = None
        self._nccl, self._has_joined = NCCLSender(), False

    @property
    def wire(self) -> Wire:
        """The dtype and bucket size that the weights travel in."""
        return self._wire

    def num_buckets(self, learner: "PPOLearner") -> int:
        """Return the number of buckets that `publish` makes."""
        return learner.num_buckets(self._wire, self._adapters_alone) if self.copies else 0

    @property
    def copies(self) -> bool:
        """Whether `publish` yields copies of the weights, which may change from then on."""
        return self._transport == "object_store"

    def publish(self, learner: "PPOLearner") -> Generator[np.ndarray | None, None, tuple[WeightManifest, str]]:
        """Make the learner's weights, or its adapters alone, ready to be sent.

        Args:
            learner: whose weights. Where they stay on the GPU, they must not change until they are sent.

        Yields:
            One bucket after the other, in the same memory: take it before you ask for the next. Each is None on ranks
            that do not lead. None is yielded where the weights stay on the GPU.

        Returns:
            The manifest, and a checksum that all ranks make in the same way.
        """
        version, size = learner.policy_version, self._wire.bucket_bytes
        named = learner.named_adapters if self._adapters_alone else learner.named_weights
        self._tensors = lambda: self._wire.round(named())
        if not self.copies:
            self._learner, self._manifest = learner, WeightManifest.of(self._tensors(), version, "sums", size)
            return self._manifest, self._manifest.checksum
        if not self._leads:  # on a GPU the weights need not come to the host to be compared
            found = WeightManifest.of(self._tensors(), version, "sums" if self._sums else "xxh3", size)
            yield from [None] * self.num_buckets(learner)
            return found, found.checksum
        sums: list[torch.Tensor] = []
        tensors = _sum_along(self._tensors(), sums) if self._sums else self._tensors()
        entries, buffers = list[TensorEntry](), self._pinned or Buffers()
        yield from fill_buckets(tensors, self._wire, buffers, entries, one_at_a_time=True)
        manifest = WeightManifest(version, "xxh3", tuple(entries))
        return manifest, (manifest.with_checksums(format_sums(sums)) if self._sums else manifest).checksum

    def join(self, group_id: str, world_size: int) -> None:
        """Join a NCCL group with engines; the first rank does.

        Raises:
            WorkerError: as `NCCLSender.join`.
        """
        self._has_joined = True
        self._nccl.join(group_id, world_size, self._wire.bucket_bytes)

    def send(self, policy_version: int) -> None:
        """Broadcast the weights that were published last to the engines of the group; other ranks gather along.

        Raises:
            WorkerLost: they are not of that version; names the learner.
        """
        manifest = self._check_version(policy_version)
        if self._has_joined:
            self._nccl.send(manifest, self._tensors())
            return
        for _ in self._tensors():
            pass

    def export(self, policy_version: int, bucket: int) -> tuple[int, dict[str, Any]]:
        """Put a bucket of the published weights into a buffer that engines on the same GPU map.

        All ranks make the calls in order, from bucket 0 on, each when the engines have read the bucket before; with
        bucket 0 the weights are sent from their beginning.

        Returns:
            The number of buckets, and a handle of the buffer under the GPU's UUID, valid until `release`.

        Raises:
            WorkerLost: as `send`.
        """
        from ppo_ray.weights.nccl_sender import LentBuffer

        buckets = [entries for _, entries in self._check_version(policy_version).buckets()]
        if bucket == 0:
            self._lent = LentBuffer(max(entries[-1].end for entries in buckets))
            self._rest = iter(self._tensors())
        assert self._lent is not None
        self._lent.fill((entry, next(self._rest)[1]) for entry in buckets[bucket])
        return len(buckets), self._lent.handle

    def release(self) -> None:
        """Free what engines have read."""
        import torch

        self._lent, self._rest = None, iter(())
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()

    def abort(self, group_id: str) -> None:
        """End a meeting or a broadcast that waits in vain, from another thread; the group is unusable afterwards."""
        self._nccl.leave(group_id)

    def _check_version(self, policy_version: int) -> WeightManifest:
        version = None if self._learner is None else self._learner.policy_version
        if self._manifest is None or {version, self._manifest.policy_version} != {policy_version}:
            raise WorkerLost(  # only a learner that is restored from its checkpoint has them again
                f"weights of policy version {policy_version} are asked for, but the learner has those of version "
                f"{'none' if version is None else version} on its GPU and no others; "
                "rollout.weight_transport=object_store keeps them for engines that come late",
                actor_name("learner", 0),
            )
        return self._manifest


def _sum_along(
    named_tensors: Iterable[tuple[str, "torch.Tensor"]], sums: "list[torch.Tensor]"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield tensors, and add the sums of each to a list."""
    for name, tensor in named_tensors:
        sums.append(word_sums(tensor))
        yield name, tensor
        del tensor  # before the next is made
