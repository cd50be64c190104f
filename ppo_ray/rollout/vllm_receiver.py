"""The receiving end of vLLM's weight-transfer API: backends for every transport, with a check of every tensor.

An update is a session: start, tensors, finish. Meanwhile vLLM replaces layer after layer as its tensors arrive. The
transports differ only in how tensors arrive: as views of buckets on the host, broadcast by NCCL, or in a buffer that is
mapped by CUDA IPC. vLLM's own backends check nothing; here every tensor passes a check on its way into the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from ppo_ray.config import Transport
from ppo_ray.errors import WorkerError
from ppo_ray.machine import return_freed_memory
from ppo_ray.models.tensors import list_names
from ppo_ray.rollout import vllm_loader as vllm_loader  # registers the load formats
from ppo_ray.rollout.vllm_adapters import AdapterModel, Shapes
from ppo_ray.rollout.vllm_sleep import find_strays, find_unwritten, let_others_grow, weight_spans
from ppo_ray.weights.checksums import format_sums, word_sums
from ppo_ray.weights.manifest import TensorEntry, WeightManifest
from ppo_ray.weights.nccl_sender import view_tensor

_DEVICE = 6  # the place of the device among the arguments of torch's `rebuild_cuda_tensor`


class CheckedModel:
    """A model that records every tensor it is given to load; it stands in for the model in vLLM's backends."""

    def __init__(self, model: Any, manifest: WeightManifest, summed: bool) -> None:
        """Wrap a model.

        Args:
            model: vLLM's, loaded by `PolicyLoader`; or an `AdapterModel`.
            manifest: of the tensors that are sent.
            summed: whether to make checksums: of tensors that nobody has verified yet.

        Raises:
            WorkerError: they are of another model.
        """
        model.checkpoint_form.begin(manifest)
        self._manifest = manifest
        self._model, self._form, self._summed = model, model.checkpoint_form, summed
        self._seen: list[tuple[str, str, tuple[int, ...]]] = []
        self._sums: list[torch.Tensor] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load tensors, as the model does."""
        arrived = list(weights)
        if self._summed:
            self._seen += [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in arrived]
            self._sums += [word_sums(tensor) for _, tensor in arrived]
        return self._model.load_weights(self._form.turn(arrived))

    def check(self) -> None:
        """Compare the tensors that arrived with those that were sent.

        Raises:
            WorkerError: names the tensors that differ, or the first that is missing or one too many.
        """
        if not self._summed:
            return
        expected = [(entry.name, entry.dtype, entry.shape) for entry in self._manifest.entries]
        if self._seen != expected:
            pairs = zip([*self._seen, None], [*expected, None], strict=False)
            found, wanted = next(pair for pair in pairs if pair[0] != pair[1])
            raise WorkerError(
                f"weights of policy version {self._manifest.policy_version} arrived damaged: {found or 'nothing'} "
                f"where {wanted or 'nothing'} was sent"
            )
        self._manifest.check(self._manifest.entries, format_sums(self._sums))


class CheckedBackend:
    """Mixin of vLLM's backends: for the length of an update the backend's model is a `CheckedModel`.

    On a CPU vLLM multiplies with packed copies of its weights. It packs a layer anew when it replaces it, but neither
    experts nor an output embedding that is the input embedding too.
    """

    model: Any
    checked: CheckedModel
    unwritten: list[str]
    """Parameters that the last update left as they were."""

    def start_weight_update(self) -> None:
        """Free what is packed, and let the backend begin: vLLM then packs experts as it does at its start."""
        on_cpu = [(layer, getattr(layer, "quant_method", None)) for layer in self.model.modules()]
        on_cpu = on_cpu if current_platform.is_cpu() else []
        self._packed = [layer for layer, _ in on_cpu if hasattr(layer, "cpu_linear")]
        for layer in self._packed:
            layer.cpu_linear = None  # frees the packed copy: the memory is for the new one
        self._experts = {layer: method for layer, method in on_cpu if isinstance(method, UnquantizedFusedMoEMethod)}
        for method in self._experts.values():
            method.moe_kernel = None
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        """Let the backend receive tensors, and load them through the check."""
        model, self.model = self.model, self.checked
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """Let the backend finish, and pack what shares its weights with a layer that was replaced.

        On a CPU the memory that is free then goes back to the system: others take it before the next update comes.

        Raises:
            WorkerError: a layer is as it was, and has no weights but packed ones.
        """
        self.unwritten = find_unwritten(self.model)
        super().finish_weight_update()  # type: ignore[misc]
        names = {layer: name for name, layer in self.model.named_modules()}
        unpacked = [layer for layer in self._packed if layer.cpu_linear is None]
        stale = [names[layer] for layer in unpacked if not layer.weight.numel()]
        stale += [names[layer] for layer, method in self._experts.items() if method.moe_kernel is None]
        if stale:
            raise WorkerError(f"vLLM got no new weights for {list_names(stale)}, and would compute with those before")
        for layer in unpacked:
            layer.quant_method.process_weights_after_loading(layer)
        if current_platform.is_cpu():  # an embedding was there twice, and loading the model has left more behind
            return_freed_memory()


class WorkerExtension:
    """Mixin of vLLM's worker; vLLM imports this module in the worker's process, which registers the backends."""

    weight_transfer_engine: Any
    sleep_mode_backend: Any
    model_runner: Any
    sleep: Any
    adapters: AdapterModel | None = None

    def let_others_grow(self) -> None:
        """Let this worker sleep although others on its GPU take memory meanwhile; see `vllm_sleep.let_others_grow`."""
        self.sleep = let_others_grow(self.sleep, lambda: self.sleep_mode_backend.state())

    def find_lost(self) -> list[str]:
        """Name what a sleep of level 2 would lose and an update as the last one would not bring back."""
        backend = self.weight_transfer_engine
        return [*backend.unwritten, *find_strays(backend.model, weight_spans())]

    def expect_adapters(self, shapes: Shapes) -> None:
        """Take adapters of these shapes instead of weights from now on; raises as `AdapterModel`."""
        self.adapters = AdapterModel(self.model_runner, shapes)

    def begin_check(self, manifest: WeightManifest, summed: bool) -> None:
        """Prepare the check of the next update; arguments as in `CheckedModel`."""
        backend = self.weight_transfer_engine
        if self.adapters is not None:
            backend.set_weight_update_target(self.adapters, backend.model_config)
        backend.checked = CheckedModel(backend.model, manifest, summed)

    def end_check(self) -> None:
        """Compare the loaded tensors with those that were sent; see `CheckedModel.check`."""
        self.weight_transfer_engine.checked.check()

    def serve_adapters(self) -> None:
        """Compute with the adapters that arrived; the end of an update of weights has taken out those before."""
        if self.adapters is not None:
            self.adapters.serve()


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


@dataclass
class LentBucket(WeightTransferUpdateInfo):
    """Tensors in memory of a learner rank, which each engine's rank maps on its own GPU."""

    handles: dict[str, tuple[Any, ...]]
    """Arguments of torch's `rebuild_cuda_tensor` for the rank's buffer of bytes, under its GPU's UUID."""
    entries: list[TensorEntry]


class _LentBuckets(_Buckets):
    """A backend whose tensors lie in a buffer that is filled anew when this process has read it."""

    update_info_cls = LentBucket

    def start_weight_update(self) -> None:
        """Prepare every layer to be replaced, and to map the buffer of this update."""
        self._importer = PackedBufferImporter()
        super().start_weight_update()

    def receive_weights(self, update_info: LentBucket) -> None:
        """Copy a bucket out of the buffer, and load its tensors; the buffer is mapped once per sync.

        Raises:
            WorkerError: no learner rank is on this GPU.
        """
        gpu = str(torch.cuda.get_device_properties(self.device).uuid)
        if gpu not in update_info.handles:
            raise WorkerError(f"no learner rank has lent its weights on GPU {gpu}, but on {list(update_info.handles)}")
        arguments = list(update_info.handles[gpu])
        arguments[_DEVICE] = self.device.index
        # vLLM keeps tensors of a layer until all of them are there, when the buffer has others already
        copy = self._importer.rebuild(arguments).clone()
        self.model.load_weights([(entry.name, view_tensor(copy, entry)) for entry in update_info.entries])
        torch.cuda.synchronize(self.device)

    def finish_weight_update(self) -> None:
        """Restore the layers that were not replaced, and give the buffer back."""
        super().finish_weight_update()
        self._importer.close()


class IPC(CheckedBackend, _LentBuckets):
    """A backend for buckets that are lent by CUDA IPC, its tensors checked."""


BACKENDS: dict[Transport, str] = {"object_store": "ppo_ray_buckets", "nccl": "ppo_ray_nccl", "ipc": "ppo_ray_ipc"}
"""vLLM's name of each transport's backend."""

WeightTransferEngineFactory.register_engine(BACKENDS["object_store"], Buckets)
WeightTransferEngineFactory.register_engine(BACKENDS["nccl"], NCCL)
WeightTransferEngineFactory.register_engine(BACKENDS["ipc"], IPC)
