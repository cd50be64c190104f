"""TRL 0.11's models: a causal language model with a value head, and a frozen copy of it as the reference.

Dimensions: B sequences, T tokens, H hidden, V vocabulary.
"""

import copy
from pathlib import Path
from typing import Any, Self

import peft
import safetensors.torch
import torch
from transformers import PreTrainedModel

from ppo_ray.config import LoraConfig
from ppo_ray.models.actor_critic import VALUE_HEAD_FILE, save_value_head
from ppo_ray.models.adapter_files import CONFIG_FILE, find_kind_problem, load_adapters, save_adapters
from ppo_ray.models.lora import ADAPTER, add_adapters, find_target_problem, is_adapter
from ppo_ray.models.saving import keep_generation_config
from ppo_ray.models.tensors import VALUE_HEAD
from ppo_ray.trl.checkpoint import load_with_value_head

_LAYER_PATTERNS = (
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
)
_REFUSED = {
    "reward_adapter": "adapters are not supported; score with a model of its own",
    "load_in_8bit": "quantised models are not trained here",
    "load_in_4bit": "quantised models are not trained here",
    "quantization_config": "quantised models are not trained here",
    "trust_remote_code": "no code of a model's folder is ever run",
    "output_loading_info": "what is wrong with a file is an error",
}
_HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class ValueHead(torch.nn.Module):
    """A linear map from the last hidden state to a value, after dropout."""

    def __init__(self, config: Any, summary_dropout_prob: float = 0.1) -> None:
        """Draw weights from torch's global generator; a model's own `summary_dropout_prob` wins."""
        super().__init__()
        probability = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = torch.nn.Dropout(probability) if probability else torch.nn.Identity()
        size = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT-350m projects its last state
        self.summary = torch.nn.Linear(size, 1)
        self.flatten = torch.nn.Flatten()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H]` to `[B, T, 1]`, in the head's own type."""
        return self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))


class AutoModelForCausalLMWithValueHead(torch.nn.Module):
    """A transformers causal LM (`pretrained_model`) with a value head (`v_head`)."""

    is_peft_model = False
    is_sequential_parallel = False

    def __init__(
        self,
        pretrained_model: Any,
        summary_dropout_prob: float = 0.1,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
    ) -> None:
        """Add a value head.

        Args:
            pretrained_model: a transformers causal LM.
            summary_dropout_prob: of the value head; PPO runs without dropout.
            v_head_initializer_range: standard deviation of the strategy `"normal"`.
            v_head_init_strategy: None: torch's default; `"normal"`: normal weights, bias zero.

        Raises:
            ValueError: the model has no language-model head, is quantised or lies on several devices, or there is no
                such strategy.
        """
        super().__init__()
        if getattr(pretrained_model, "hf_quantizer", None) is not None:
            raise ValueError("quantised models are not trained here; load the model without quantization_config")
        if pretrained_model.get_output_embeddings() is None:
            raise ValueError(f"{type(pretrained_model).__name__} has no language-model head; give a causal LM")
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        devices = {parameter.device for parameter in pretrained_model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"the model lies on {sorted(map(str, devices))}; it must be on one. Leave out device_map, or name a "
                'single device: device_map="cuda:0"'
            )
        self.v_head = ValueHead(self.config.get_text_config(), summary_dropout_prob).to(devices.pop())
        if v_head_init_strategy == "normal":
            torch.nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            torch.nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ValueError(f"v_head_init_strategy={v_head_init_strategy!r}; it must be None or 'normal'")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | Any, *args: Any, **kwargs: Any) -> Self:
        """Load a causal LM, safetensors only, and the value head that was saved with it, if there is one.

        Args:
            pretrained_model_name_or_path: a folder, a hub name, or a transformers causal LM, which is wrapped as it is.
            *args: for `AutoModelForCausalLM.from_pretrained`.
            **kwargs: likewise; those of the constructor go there. Weights are float32 unless `dtype` says otherwise.

        Raises:
            ValueError: an argument cannot be honoured. `peft_config` takes peft's LoraConfig.
            OSError: there is no such model, or it has no safetensors weights.
        """
        adapters = kwargs.pop("peft_config", None)
        for name, reason in _REFUSED.items():
            if kwargs.pop(name, None):
                raise ValueError(f"{name} cannot be honoured: {reason}")
        if kwargs.pop("use_safetensors", None) not in (None, True):
            raise ValueError(
                "use_safetensors=False cannot be honoured: pickled weights can run code when they are read"
            )
        for name in ("reward_adapter_name", "is_trainable"):  # adapters are always trained, and none scores
            kwargs.pop(name, None)
        head = {name: kwargs.pop(name) for name in _HEAD_ARGUMENTS if name in kwargs}
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            if args or kwargs:
                raise ValueError(f"{[*args, *kwargs]} cannot be honoured: the model is loaded already")
            return cls(pretrained_model_name_or_path, **head)._adapt(adapters)
        if not isinstance(pretrained_model_name_or_path, str | Path):
            raise ValueError(f"give a folder, a hub name or a causal LM, not {type(pretrained_model_name_or_path)}")
        path = Path(pretrained_model_name_or_path)
        if (path / CONFIG_FILE).is_file():  # as `save_pretrained` writes adapters
            if adapters is not None:
                raise ValueError(f"peft_config cannot be honoured: {path} holds adapters already")
            saved = peft.LoraConfig.from_pretrained(path)
            base, value_head = load_with_value_head(str(saved.base_model_name_or_path), *args, **kwargs)
            model = cls(base, **head)._adapt(saved)
            load_adapters(base, str(path))
            value_head |= {f"{VALUE_HEAD}summary.{name}": tensor for name, tensor in _read_head(path).items()}
        else:
            pretrained_model, value_head = load_with_value_head(str(path), *args, **kwargs)
            model = cls(pretrained_model, **head)._adapt(adapters)
        model.post_init(value_head)
        return model

    def _adapt(self, config: Any) -> Self:
        """Put adapters into the model; None: none.

        Raises:
            ValueError: they are not plain LoRA of linear maps.
        """
        if config is None:
            return self
        if not isinstance(config, peft.PeftConfig):
            raise ValueError(f"peft_config must be a peft.LoraConfig, not {type(config)}")
        if problem := find_kind_problem(config.to_dict()):
            raise ValueError(f"peft_config cannot be honoured: its adapters {problem}")
        targets = () if isinstance(config.target_modules, str | None) else tuple(config.target_modules)
        if problem := find_target_problem(self.pretrained_model, LoraConfig(targets=targets)):
            raise ValueError(f"peft_config.target_modules: {problem}")
        add_adapters(self.pretrained_model, config, torch.initial_seed() % (1 << 63))
        own = self.pretrained_model.peft_config[ADAPTER]
        own.base_model_name_or_path = own.base_model_name_or_path or self.config.name_or_path
        self.is_peft_model = True
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run the model and the value head.

        Returns:
            Logits `[B, T, V]` float32, the loss (None without labels), values `[B, T]`; and, if asked, the cache.
        """
        output = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **{**kwargs, "output_hidden_states": True},
        )
        values = self.v_head(output.hidden_states[-1]).squeeze(-1)
        answer = (output.logits.float(), output.loss, values)
        return (*answer, output.past_key_values) if return_past_key_values else answer

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model's `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the wrapped model's state under its own names, and the value head's under `v_head.`."""
        state = dict(self.pretrained_model.state_dict(*args, **kwargs))
        return state | {VALUE_HEAD + name: tensor for name, tensor in self.v_head.state_dict(*args, **kwargs).items()}

    def post_init(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load the value head from the `v_head.*` of a state; without any it stays as it is."""
        head = {
            name.removeprefix(VALUE_HEAD): tensor for name, tensor in state_dict.items() if name.startswith(VALUE_HEAD)
        }
        if head:
            self.v_head.load_state_dict(head)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Write the model with `v_head.*` beside its own weights, for `from_pretrained` here and in transformers.

        Of a model with adapters these and the value head alone are written, as in a checkpoint (`model.lora.path`).
        """
        if self.is_peft_model:
            named = self.pretrained_model.named_parameters()
            save_adapters(self.pretrained_model, Path(save_directory), {n: p for n, p in named if is_adapter(n)})
            save_value_head(Path(save_directory) / VALUE_HEAD_FILE, self.v_head.summary.state_dict())
            return None
        state = kwargs.pop("state_dict", None) or self.state_dict()
        with keep_generation_config(self.pretrained_model):
            return self.pretrained_model.save_pretrained(save_directory, state_dict=state, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the wrapped model, the value head within it."""
        self.pretrained_model.v_head = self.v_head
        try:
            with keep_generation_config(self.pretrained_model):
                return self.pretrained_model.push_to_hub(*args, **kwargs)
        finally:
            del self.pretrained_model.v_head

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable it in the wrapped model; it has no effect in eval mode, in which PPO runs."""
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)


def _read_head(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / VALUE_HEAD_FILE
    return safetensors.torch.load_file(file) if file.is_file() else {}


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead, num_shared_layers: int | None = None, pattern: str | None = None
) -> AutoModelForCausalLMWithValueHead:
    """Copy a model as the frozen reference, in eval mode.

    Args:
        model: whose copy is wanted.
        num_shared_layers: how many of the first layers become the same tensors in both models, frozen, with all that
            the model lists before them (its embeddings, and with them a tied head); None: nothing is shared, and
            `model` is left as it is.
        pattern: the name of a layer, e.g. `"transformer.h.{layer}"`; None: found by the model's names.

    Raises:
        ValueError: no layer is named so.
    """
    parameters = dict(model.named_parameters())
    shared: list[torch.nn.Parameter] = []
    if num_shared_layers is not None:
        patterns = [layer.format(layer=num_shared_layers) for layer in ([pattern] if pattern else _LAYER_PATTERNS)]
        first = next((index for layer in patterns for index, name in enumerate(parameters) if layer in name), None)
        if first is None:
            raise ValueError(
                f"no parameter is named like {' or '.join(patterns)}; give pattern, or fewer num_shared_layers"
            )
        shared = list(parameters.values())[:first]
    for parameter in shared:
        parameter.requires_grad_(False)
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()
