"""vLLM's loader of a policy, and the form in which tensors of an update are loaded: that of a model's own files.

Importing this module registers the load formats `ppo_ray_auto` and `ppo_ray_safetensors`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
from vllm.model_executor.models.bloom import BloomMLP

from ppo_ray.errors import WorkerError
from ppo_ray.models.tensors import VALUE_HEAD, list_names
from ppo_ray.weights.manifest import WeightManifest

_LAYER = re.compile(r".*?\.\d+(?=\.)")

NamedTensors = list[tuple[str, torch.Tensor]]


class CheckpointForm:
    """Turns tensors as transformers holds them into those of a model's files, which are all that vLLM can load.

    Some models differ: transformers 5 fuses a layer's experts, whose files have one tensor for each. A layer is turned
    when all of its tensors have arrived, so no more than a layer is held.
    """

    def __init__(self, path: str, remote_code: bool) -> None:
        """Read from a model's config how its tensors differ; `remote_code`: whether its own code is trusted."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=remote_code)
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
        self._differs = bool(get_model_conversion_mapping(self._model, add_legacy=False))
        self._layers: dict[str, set[str]] = {}
        for name, _ in self._model.named_parameters():
            self._layers.setdefault(_find_layer(name), set()).add(name)
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def begin(self, manifest: WeightManifest) -> None:
        """Prepare for an update; raises WorkerError if it has not all of the model's tensors, or others."""
        self._held = {}
        if differing := {entry.name for entry in manifest.entries} ^ set().union(*self._layers.values()):
            raise WorkerError(f"the weights are of another model: names differ, {list_names(differing)}")

    def turn(self, arrived: NamedTensors) -> NamedTensors:
        """Return the tensors of all layers that are whole now; the others are kept, as copies, until they are."""
        if not self._differs:
            return arrived
        whole: NamedTensors = []
        for name, tensor in arrived:
            layer = _find_layer(name)
            held = self._held.setdefault(layer, {})
            held[name] = tensor
            if held.keys() == self._layers[layer]:
                whole += revert_weight_conversion(self._model, self._held.pop(layer)).items()
        for name, tensor in arrived:  # what lends them may be used again for the next ones
            if name in (held := self._held.get(_find_layer(name), {})):
                held[name] = tensor.clone()
        return whole


def _find_layer(name: str) -> str:
    """Return the first part of a tensor's name, up to the number of its layer, or the whole name."""
    found = _LAYER.match(name)
    return found.group() if found else name


@register_model_loader("ppo_ray_auto")
@register_model_loader("ppo_ray_safetensors")
class PolicyLoader(DefaultModelLoader):
    """vLLM's loader, but for the value head that `ppo_ray.trl` saves among a model's own tensors."""

    def __init__(self, load_config: Any) -> None:
        """Load as vLLM's format of that name, without `ppo_ray_`, does."""
        super().__init__(replace(load_config, load_format=load_config.load_format.removeprefix("ppo_ray_")))

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        """Load a model; its `checkpoint_form` is what it loads later weights by.

        The form comes first: where vLLM runs transformers' own layers, it changes their classes.
        """
        form = CheckpointForm(model_config.model, model_config.trust_remote_code)
        model = super().load_model(vllm_config, model_config, prefix)
        model.checkpoint_form = form
        for layer in model.modules():
            if isinstance(layer, BloomMLP):
                layer.gelu_impl = torch.nn.GELU("tanh")  # the model's own; vLLM's is the exact function, 1e-3 nats off
        return model

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors of the model's files but the value head's."""
        tensors = super().get_all_weights(model_config, model)
        return ((name, tensor) for name, tensor in tensors if not name.startswith(VALUE_HEAD))
