"""Adapters in vLLM: taken from memory as any weights that arrive, checked as they are, and set in place.

vLLM itself loads adapters from files. Here its own classes are given tensors: `LoRAModel.from_lora_tensors` makes of
them what its manager copies into the memory that its layers read.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from ppo_ray.errors import WorkerError
from ppo_ray.models.tensors import A_NAME, list_names
from ppo_ray.plan.adapters import round_rank
from ppo_ray.weights.manifest import WeightManifest

Shapes = Mapping[str, tuple[int, ...]]
_ID = 1
REQUEST = LoRARequest("policy", _ID, "in memory")
"""What each request for the policy's adapters names. vLLM asks for a path, and looks there if it has no adapters."""


def engine_options(shapes: Shapes) -> dict[str, Any]:
    """Return what `vllm.LLM` is given to serve one set of adapters.

    Args:
        shapes: of A `[rank, in]` and B `[out, rank]` of each linear map, by their names.
    """
    maps = {name.removesuffix(A_NAME) for name in shapes if name.endswith(A_NAME)}
    rank = max(shape[0] for name, shape in shapes.items() if name.endswith(A_NAME))
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "max_lora_rank": round_rank(rank),
        # else all that can have adapters would: the output embedding too, at the cost of a second one
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in maps}),
    }


class AdapterModel(torch.nn.Module):
    """Stands in for vLLM's model in an update of its weights, and takes the policy's adapters."""

    def __init__(self, runner: Any, shapes: Shapes) -> None:
        """Take a worker's model runner and the adapters' shapes, as in `engine_options`.

        Raises:
            WorkerError: vLLM computes no adapters for some of the maps.
        """
        super().__init__()
        self._lora, self._manager = runner.lora_config, runner.lora_manager._adapter_manager
        self._shapes = shapes
        self._device = runner.device
        self._held: dict[str, torch.Tensor] = {}
        self._check_layers({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})

    @property
    def checkpoint_form(self) -> "AdapterModel":
        """Itself: adapters arrive in the form in which they are taken."""
        return self

    def begin(self, manifest: WeightManifest) -> None:
        """Prepare for an update; raises WorkerError if it has not all of the adapters, or others."""
        self._held = {}
        found = {entry.name: entry.shape for entry in manifest.entries}
        if differing := {name for name in self._shapes.keys() | found if self._shapes.get(name) != found.get(name)}:
            raise WorkerError(f"the adapters are of another model: they differ in {list_names(differing)}")

    def turn(self, arrived: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Return what arrived."""
        return arrived

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep copies of adapters: what lends them may be used again for the next ones."""
        self._held |= {name: tensor.to(self._device, self._lora.lora_dtype, copy=True) for name, tensor in weights}

    def serve(self) -> None:
        """Compute with the adapters that have arrived from now on."""
        held, self._held = self._held, {}
        adapters = self._make(held)
        self._manager.remove_adapter(_ID)
        self._manager.add_adapter(adapters)
        self._manager.activate_adapter(_ID)

    def _make(self, tensors: dict[str, torch.Tensor]) -> LoRAModel:
        """Make vLLM's own record of adapters; their scale is in B, so it is 1 here."""
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_lora_tensors(
            _ID,
            tensors,
            PEFTHelper(r=1, lora_alpha=1, target_modules=[]),
            device=str(next(iter(tensors.values())).device),
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
            skip_prefixes=getattr(self._manager.model, "lora_skip_prefixes", None),
        )

    def _check_layers(self, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse maps that vLLM would leave without their adapters, of which it only writes to its log."""
        layers = set(self._manager.modules)
        packed = {part for parts in self._manager.packed_modules.values() for part in parts}
        found = self._make(tensors).loras
        lost = found.keys() - layers - packed
        if lost or 2 * len(found) != len(tensors):
            raise WorkerError(
                f"vLLM computes no adapters for {list_names(lost) or 'some of the linear maps'}; "
                "rollout.adapter_sync=merged sends whole weights, the adapters merged into them"
            )
