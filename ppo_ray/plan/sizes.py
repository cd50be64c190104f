"""The sizes of a config's models, from the models' own configs alone: weights are not read, and need not be there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import safetensors

from ppo_ray.config import DEFAULT_RANK, Config, LoraConfig, ModelConfig, Quantization, Trust, revision_problem
from ppo_ray.errors import InputError, first_line

_TRACED_TOKENS = 64


@dataclass(frozen=True)
class ModelSize:
    """The part of a model's shape that its memory depends on."""

    parameters: int
    """A tied head is counted once."""
    embeddings: int
    """Those of them that are in the embedding and the head."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward layers."""
    vocabulary: int
    key_values: int
    """Keys and values of one token in one layer: 2 x key-value heads x their width."""
    sharing_heads: int = 0
    """Heads of queries, if several of them share the keys of one head; 0: each has keys of its own."""
    adapters: int = 0
    """Parameters of the adapters (LoRA) that are trained instead of the model's own; 0: none."""
    quantization: Quantization | None = None
    maps: tuple[tuple[int, int], ...] = ()
    """Shapes of the linear maps, out and in, of which codes are kept; empty without `quantization`."""
    trace: Callable[[], int] | None = field(default=None, repr=False, compare=False)
    """Finds `activation_bytes`; None: the model is not trained."""

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes that the layers keep of each token for the backward pass; 0 unless the model is trained.

        The model's own code tells, when this is first asked for: engines and checkpoints do not need it.
        """
        return self.trace() if self.trace else 0

    @property
    def trained(self) -> int:
        """Parameters that the optimizer steps."""
        return self.adapters or self.parameters

    @property
    def mapped(self) -> int:
        """Parameters of which codes are kept."""
        return sum(map(math.prod, self.maps))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes and their scales, as `models/quantization.py` keeps them."""
        if self.quantization == "int8":
            return self.mapped + sum(4 * rows for rows, _ in self.maps)
        scales = [math.ceil(rows * columns / 64) for rows, columns in self.maps]
        halves = [math.ceil(rows * columns / 2) for rows, columns in self.maps]
        return sum(halves) + sum(scales) + sum(4 * math.ceil(number / 256) + 4 for number in scales)


@dataclass(frozen=True)
class ModelSizes:
    """The models of a run."""

    policy: ModelSize
    reference: ModelSize
    critic: ModelSize | None
    """None: a linear head on the policy."""
    classifiers: tuple[ModelSize, ...]
    """That score; Python functions are not among them."""
    judges: tuple[ModelSize, ...] = ()
    has_values: bool = True
    """Whether the policy has a value head, or the critic that is named."""

    @classmethod
    def read(cls, config: Config) -> "ModelSizes":
        """Read the models' configs and build each without memory for its weights.

        Raises:
            InputError: a model has no config that transformers can read; names the key.
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

        model, reward = config.model, config.reward
        policy = _read("model.path", model.path, model.trust, AutoModelForCausalLM, model)
        separate, other = model.critic == "separate", model.reference_path is not None
        reference = _read("model.reference_path", *model.reference, AutoModelForCausalLM) if other else policy
        return cls(
            policy,
            reference,
            _read("model.critic_path", *model.critic_source, AutoModel, model) if separate else None,
            tuple(
                _read(f"{key}.path", source.path, source.trust, AutoModelForSequenceClassification)
                for key, source in reward.sources
                if source.path
            ),
            tuple(
                _read(f"{key}.judge.path", source.judge.path, source.judge.trust, AutoModelForCausalLM)
                for key, source in reward.sources
                if source.judge
            ),
            has_values=config.ppo.has_values,
        )


def _read(key: str, path: str, trust: Trust, auto_class: Any, trained: ModelConfig | None = None) -> ModelSize:
    import torch
    from transformers import AutoConfig

    if problem := revision_problem(path, trust.revision):
        raise InputError(f"{key}={path}: {problem}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust.remote_code, **trust.place)
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust.remote_code)
    except Exception as error:  # OSError, ValueError, whatever a hub client raises, or the model's own code
        hint = "; `ppo-ray assets imdb` builds the demo's models" if not Path(path).exists() else ""
        problem = f"its size is not known, its config cannot be read: {first_line(error)}{hint}"
        raise InputError(f"{key}={path}: {problem}") from error
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    intermediate = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden)
    trace = None
    if trained:
        dtype, numbers = getattr(torch, trained.dtype), layers * (12 * hidden + 4 * intermediate)
        trace = partial(_count_activation_bytes, model.base_model, dtype, numbers * dtype.itemsize)
    heads = int(getattr(text, "num_attention_heads", 1))
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embeddings=sum(weight.numel() for weight in _embeddings(model)),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=int(text.vocab_size),
        key_values=2 * kv_heads * width,
        sharing_heads=heads if heads > kv_heads else 0,
        adapters=_count_adapters(model, trained.lora) if trained and trained.lora else 0,
        quantization=trained.quantization if trained else None,
        maps=tuple(map(_shape, _linear_maps(model).values())) if trained and trained.quantization else (),
        trace=trace,
    )


def _count_activation_bytes(base_model: Any, dtype: Any, estimate: int) -> int:
    """Return the bytes that a model without a head keeps of each token for its backward pass.

    A forward pass without values is made for it. Of attention it counts queries, keys, values and the result, as of a
    kernel that keeps no scores.

    Args:
        base_model: on the device `meta`; its dtype is changed.
        dtype: torch's, in which the learner computes.
        estimate: the result where the model's code cannot run without values.
    """
    import torch
    from transformers import AttentionInterface

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    def attend(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> tuple[torch.Tensor, None]:
        for tensor in (query, key, value):
            keep(tensor)
        return (query[..., : value.shape[-1]] + 0).transpose(1, 2).contiguous(), None

    base_model.to(dtype).eval()
    if base_model._can_set_attn_implementation():
        AttentionInterface.register("ppo_ray_counted", attend)
        base_model.set_attn_implementation("ppo_ray_counted")
    tokens = torch.zeros((1, _TRACED_TOKENS), dtype=torch.int64, device="meta")
    mask = torch.zeros((1, 1, 1, 1), device="meta")  # which a model passes on as it is
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except Exception:  # the model's own code, whatever it does
        return estimate
    weights = {weight.untyped_storage()._cdata for weight in base_model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights) // _TRACED_TOKENS


def _count_adapters(model: Any, lora: LoraConfig) -> int:
    """Return the parameters of a model's adapters: rank x (in + out) for each linear map; the head has none."""
    file = Path(lora.path or "") / "adapter_model.safetensors"
    if lora.path is not None and file.is_file():
        with safetensors.safe_open(file, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    ends = tuple(f".{target}" for target in lora.targets or ())
    return sum(
        (lora.rank or DEFAULT_RANK) * sum(module.weight.shape)
        for name, module in _linear_maps(model).items()
        if not ends or f".{name}".endswith(ends)
    )


def _linear_maps(model: Any) -> dict[str, Any]:
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _embeddings(model: Any) -> set[Any]:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {module.weight for module in modules if module is not None}
