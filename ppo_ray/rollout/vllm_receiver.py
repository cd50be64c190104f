"""The receiving end of vLLM's weight-transfer API: backends for every transport, with a check of every tensor.

An update is a session: start, tensors, finish. Meanwhile vLLM replaces layer after layer as its tensors arrive. The
transports differ only in how tensors arrive: as views of buckets on the host, broadcast by NCCL, or mapped by CUDA IPC.
vLLM's own backends check nothing; here every tensor passes a check on its way into the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from ppo_ray.config import Transport
from ppo_ray.errors import WorkerError
from ppo_ray.weights.checksums import format_sums, word_sums
from ppo_ray.weights.manifest import WeightManifest

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


class CheckedModel:
    """A model that records every tensor it is given to load; it stands in for the model in vLLM's backends."""

    def __init__(self, model: Any, tied_head: bool, summed: bool) -> None:
        """Wrap a model.

        Args:
            model: vLLM's.
            tied_head: whether its head is its embedding.
            summed: whether to make checksums: of tensors that nobody has verified yet.
        """
        self._model, self._tied_head, self._summed = model, tied_head, summed
        self._embeddings: list[str] = []
        self._seen: list[tuple[str, str, tuple[int, ...]]] = []
        self._sums: list[torch.Tensor] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load tensors, as the model does."""
        arrived = list(weights)
        if self._summed:
            self._seen += [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in arrived]
            self._sums += [word_sums(tensor) for _, tensor in arrived]
        if self._tied_head:
            # On a CPU the head multiplies with a packed copy of its own: without its own entry it would stay stale
            # and no error would tell.
            heads = [("lm_head.weight", tensor) for name, tensor in arrived if name.endswith(_EMBEDDINGS)]
            self._embeddings += [name for name, _ in arrived if name.endswith(_EMBEDDINGS)]
            arrived = [(name, tensor) for name, tensor in arrived if name != "lm_head.weight"] + heads
        return self._model.load_weights(arrived)

    def check(self, manifest: WeightManifest) -> None:
        """Compare the tensors that arrived with those that were sent.

        Raises:
            WorkerError: names the tensors that differ, or the first that is missing or one too many.
        """
        if self._tied_head and len(self._embeddings) != 1:
            raise WorkerError(f"cannot tell which tensor is the tied embedding among {self._embeddings or 'all'}")
        if not self._summed:
            return
        expected = [(entry.name, entry.dtype, entry.shape) for entry in manifest.entries]
        if self._seen != expected:
            pairs = zip([*self._seen, None], [*expected, None], strict=False)
            found, wanted = next(pair for pair in pairs if pair[0] != pair[1])
            raise WorkerError(
                f"weights of policy version {manifest.policy_version} arrived damaged: {found or 'nothing'} where "
                f"{wanted or 'nothing'} was sent"
            )
        manifest.check(manifest.entries, format_sums(self._sums))


class CheckedBackend:
    """Mixin of vLLM's backends: for the length of an update the backend's model is a `CheckedModel`."""

    model: Any
    checked: CheckedModel

    def receive_weights(self, update_info: Any) -> None:
        """Let the backend receive tensors, and load them through the check."""
        model, self.model = self.model, self.checked
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model


class WorkerExtension:
    """Mixin of vLLM's worker; vLLM imports this module in the worker's process, which registers the backends."""

    weight_transfer_engine: Any

    def begin_check(self, tied_head: bool, summed: bool) -> None:
        """Prepare the check of the next update; arguments as in `CheckedModel`."""
        self.weight_transfer_engine.checked = CheckedModel(self.weight_transfer_engine.model, tied_head, summed)

    def end_check(self, manifest: WeightManifest) -> None:
        """Compare the loaded tensors with those that were sent; see `CheckedModel.check`."""
        self.weight_transfer_engine.checked.check(manifest)


@dataclass
class NoInit(WeightTransferInitInfo):
    """Empty: buckets need no preparation."""


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Tensors that are on the host, verified."""

    tensors: list[tuple[str, torch.Tensor]]


class _Buckets(WeightTransferEngine[NoInit, Bucket]):
    """A backend whose tensors are passed by reference, in this process."""

    init_info_cls, update_info_cls = NoInit, Bucket

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Prepare every layer to be replaced."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Load the tensors of a bucket."""
        self.model.load_weights(update_info.tensors)

    def finish_weight_update(self) -> None:
        """Restore the layers that were not replaced."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing."""


class Buckets(CheckedBackend, _Buckets):
    """A backend for buckets, its tensors checked."""


class NCCL(CheckedBackend, NCCLWeightTransferEngine):
    """vLLM's NCCL backend, its tensors checked."""


class IPC(CheckedBackend, IPCWeightTransferEngine):
    """vLLM's CUDA IPC backend, its tensors checked."""


BACKENDS: dict[Transport, str] = {"object_store": "ppo_ray_buckets", "nccl": "ppo_ray_nccl", "ipc": "ppo_ray_ipc"}
"""vLLM's name of each transport's backend."""

WeightTransferEngineFactory.register_engine(BACKENDS["object_store"], Buckets)
WeightTransferEngineFactory.register_engine(BACKENDS["nccl"], NCCL)
WeightTransferEngineFactory.register_engine(BACKENDS["ipc"], IPC)
