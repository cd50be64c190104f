"""The learner's end of the weight transports: weights made ready, and sent where they stay on its GPU."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_ray.config import Config, weight_transport
from ppo_ray.errors import WorkerLost
from ppo_ray.plan.demand import actor_name
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import Buffers, Wire

if TYPE_CHECKING:
    import torch

    from ppo_ray.learner.learner import PPOLearner
    from ppo_ray.weights.nccl_sender import NCCLSender


class WeightPublisher:
    """One rank's end of the transport. Not thread-safe, except `abort`."""

    def __init__(self, config: Config, leads: bool) -> None:
        """Prepare to publish.

        Args:
            config: of the run.
            leads: whether this is the first rank; the others only describe their weights.
        """
        self._transport, self._leads = weight_transport(config), leads
        self._wire = Wire(config.rollout.wire_dtype, config.rollout.weight_bucket_mib << 20)
        self._buffers = Buffers()
        self._manifest: WeightManifest | None = None
        self._tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] = list
        self._mapped: list[torch.Tensor] = []
        self._nccl: NCCLSender | None = None

    @property
    def wire(self) -> Wire:
        """The dtype and bucket size that the weights travel in."""
        return self._wire

    def num_buckets(self, learner: "PPOLearner") -> int:
        """Return the number of buckets that `publish` makes."""
        return learner.num_buckets(self._wire) if self._transport == "object_store" else 0

    def publish(self, learner: "PPOLearner", keep: bool = False) -> tuple[WeightManifest, list[np.ndarray | None]]:
        """Make the learner's weights ready to be sent.

        Args:
            learner: whose weights.
            keep: whether to copy weights that stay on the GPU: the parameters will have changed when they are sent.

        Returns:
            The manifest and the buckets, which the next call overwrites. Each bucket is None on ranks that do not lead.
            The list is empty where the weights stay on the GPU.
        """
        if self._transport == "object_store":
            if self._leads:
                snapshot = learner.weights(self._wire, self._buffers)
                return snapshot.manifest, list(snapshot.buckets)
            named = self._wire.round(learner.named_weights())
            return WeightManifest.of(named, learner.policy_version, "xxh3"), [None] * self.num_buckets(learner)
        self._tensors = lambda: self._wire.round(learner.named_weights())
        if keep:
            kept = [(name, tensor.clone()) for name, tensor in self._tensors()]
            self._tensors = lambda: kept
        self._manifest = WeightManifest.of(self._tensors(), learner.policy_version, "sums")
        return self._manifest, []

    def join(self, group_id: str, world_size: int) -> None:
        """Join a NCCL group with engines."""
        from ppo_ray.weights.nccl_sender import NCCLSender

        self._nccl = self._nccl or NCCLSender()
        self._nccl.join(group_id, world_size, self._wire.bucket_bytes)

    def send(self, policy_version: int) -> None:
        """Broadcast the weights that were published last to the engines of the group; other ranks gather along.

        Raises:
            WorkerLost: they are not of that version; names the learner.
        """
        manifest = self._check_version(policy_version)
        if self._nccl is not None:
            self._nccl.send(manifest, self._tensors())
            return
        for _ in self._tensors():
            pass

    def export(self, policy_version: int) -> list[dict[str, Any]]:
        """Return IPC handles of the published weights for engines on the same GPU, valid until `release`.

        Raises:
            WorkerLost: as `send`.
        """
        from ppo_ray.weights.nccl_sender import ipc_handles

        self._check_version(policy_version)
        self._mapped = [tensor.contiguous() for _, tensor in self._tensors()]
        return ipc_handles(self._mapped)

    def release(self) -> None:
        """Free what engines have read."""
        import torch

        self._mapped = []
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()

    def abort(self) -> None:
        """End a broadcast that waits in vain, from another thread; the group is unusable afterwards."""
        if self._nccl is not None:
            self._nccl.leave()

    def _check_version(self, policy_version: int) -> WeightManifest:
        if self._manifest is None or self._manifest.policy_version != policy_version:
            raise WorkerLost(  # only a learner that is restored from its checkpoint has them again
                f"weights of policy version {policy_version} are asked for, but the learner has those of version "
                f"{self._manifest.policy_version if self._manifest else 'none'} on its GPU and no others; "
                "rollout.weight_transport=object_store keeps them for engines that come late",
                actor_name("learner", 0),
            )
        return self._manifest
