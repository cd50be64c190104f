"""The policy and what estimates its values: a value head on its own decoder, or on a critic beside it.

Dimensions: B sequences, R response tokens, N response tokens in all, H hidden units.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ppo_ray.errors import InputError
from ppo_ray.models.decoder import Decoder, Traits
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM, ResponseOutput, unflatten
from ppo_ray.models.saving import State, TensorFile, model_file, save_config, write_tensors
from ppo_ray.models.tensors import VALUE_HEAD, read_value_head

VALUE_HEAD_FILE = Path("value_head") / "value_head.safetensors"
"""Lies in a checkpoint below its decoder: `weight` `[1, H]` and `bias` `[1]`. In a folder of its own, because vLLM
loads every safetensors file of a model's folder as a part of the model."""
CRITIC_FOLDER = "critic"
"""Lies in a checkpoint beside the policy: the critic's decoder, for `AutoModel.from_pretrained`, and its value head."""


class ActorCritic(ResponseLM):
    """A causal LM, the policy, with a linear value head or without; no dropout in either.

    Subclasses say which hidden states the value head reads. Their `forward` returns values too. This class itself is a
    policy that has no values.
    """

    value_head: torch.nn.Linear | None
    """From H to 1; float32 or better. None: there are no values."""
    adapted = False
    """Whether adapters (LoRA) are trained on frozen weights."""

    def __init__(self, causal_lm: Any, *, temperature: float, traits: Traits | None = None) -> None:
        """Wrap a loaded model, as `ResponseLM`, and give it no value head."""
        super().__init__(causal_lm, temperature=temperature, traits=traits)
        self.value_head = None

    def forward_values(self, rows: PackedRows) -> torch.Tensor:
        """Compute the values `[B, R]` alone, with no gradient for the policy."""
        raise NotImplementedError

    def forward_reference(self, rows: PackedRows) -> ResponseOutput:
        """Compute what the policy without its adapters does, without gradient and values."""
        from ppo_ray.models.lora import without_adapters

        with torch.no_grad(), without_adapters(self.causal_lm):
            return ResponseLM.forward(self, rows)

    def policy_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the causal LM's parameters."""
        return self.causal_lm.parameters()

    def value_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters that estimate values and are no part of the policy."""
        return iter(()) if self.value_head is None else self.value_head.parameters()

    def load_value_head(self, path: str | Path, **place: Any) -> None:
        """Load the value head that was saved with its decoder, if there is one.

        Args:
            path: folder or hub name of the decoder. The head lies in a file of its own, as in a checkpoint, or as
                `v_head.*` among the decoder's tensors, as `ppo_ray.trl` and TRL save it.
            **place: where else to look, for transformers' `cached_file`.

        Raises:
            InputError: what lies there is not a value head of this hidden size, or holds NaN.
        """
        assert self.value_head is not None
        file = Path(path) / VALUE_HEAD_FILE
        if file.is_file():
            where, tensors = str(file), safetensors.torch.load_file(file)
        else:
            where = f"{path} ({VALUE_HEAD}*)"
            named = read_value_head(str(path), **place)
            tensors = {name.removeprefix(f"{VALUE_HEAD}summary."): tensor for name, tensor in named.items()}
        if not tensors:
            return
        wanted = {name: tuple(tensor.shape) for name, tensor in self.value_head.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise InputError(f"{where} holds {found}, this model needs {wanted}; remove it to start a new head")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise InputError(f"{where} holds NaN or infinite weights; remove it to start a new head")
        self.value_head.load_state_dict(tensors)

    def list_files(self, state: State) -> list[TensorFile]:
        """Return the files of a checkpoint that hold a state of this module; the policy's is the first.

        Of a model with adapters these alone are in them, and the state has nothing else of it. Subclasses add what is
        theirs.
        """
        return [self._model_file(self.causal_lm, Path(), _select(state, "causal_lm"))]

    def save_configs(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what a checkpoint holds of the models beside their tensors, which are of a type."""
        self._save_config(self.causal_lm, folder, dtype)

    def _model_file(self, model: Any, folder: Path, tensors: State) -> TensorFile:
        if not self.adapted:
            return model_file(model, folder, tensors)
        from ppo_ray.models.adapter_files import WEIGHTS_FILE, name_adapters

        return TensorFile(folder / WEIGHTS_FILE, tensors, name_adapters, has_parts=False)

    def _save_config(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        if not self.adapted:
            save_config(model, folder, dtype)
            return
        from ppo_ray.models.adapter_files import save_adapter_config

        save_adapter_config(model, folder)

    def _apply_value_head(self, states: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Compute values `[B, R]` from hidden states `[N, H]`; zero outside the mask."""
        assert self.value_head is not None
        return unflatten(self.value_head(states.to(self.value_head.weight.dtype))[:, 0], rows)


class CausalLMWithValueHead(ActorCritic):
    """A causal LM with a value head on its last hidden state."""

    def __init__(
        self,
        causal_lm: Any,
        *,
        temperature: float,
        value_head: torch.nn.Linear | None = None,
        value_head_seed: int = 0,
        traits: Traits | None = None,
    ) -> None:
        """Add a value head, the caller's or a new one.

        Args:
            causal_lm: a transformers causal LM, on its device, in eval mode.
            temperature: divides the logits, never the values.
            value_head: from H to 1; None: a new one, see `make_value_head`.
            value_head_seed: of its initial weights.
            traits: as `ResponseLM`.

        Raises:
            InputError: the model is not supported; see `ResponseLM`.
        """
        super().__init__(causal_lm, temperature=temperature, traits=traits)
        weight = causal_lm.get_output_embeddings().weight
        self.value_head = value_head or make_value_head(weight.shape[1], weight.dtype, value_head_seed)
        _move_to(self.value_head, self.device)

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token and the value of the prefix before it."""
        output = super().forward(rows)
        return replace(output, values=self._apply_value_head(output.states, rows))

    def forward_values(self, rows: PackedRows) -> torch.Tensor:
        """Compute the values `[B, R]` alone, with a gradient for the value head alone."""
        with torch.no_grad():
            states = self.decoder.run(rows)
        return self._apply_value_head(states, rows)

    def list_files(self, state: State) -> list[TensorFile]:
        """Return the files of policy and value head, as `ActorCritic.list_files`."""
        head = TensorFile(VALUE_HEAD_FILE, _select(state, "value_head"), has_parts=False)
        return [*super().list_files(state), head]


class CausalLMWithCritic(ActorCritic):
    """A causal LM, and a decoder of its own with the value head, out of the policy gradient's way."""

    def __init__(
        self,
        causal_lm: Any,
        critic: Any,
        *,
        temperature: float,
        value_head_seed: int = 0,
        traits: Traits | None = None,
        critic_traits: Traits | None = None,
    ) -> None:
        """Put the two beside one another.

        Args:
            causal_lm: the policy, a transformers causal LM, on its device, in eval mode.
            critic: a transformers model without a head that reads the policy's tokens, on the same device.
            temperature: divides the logits, never the values.
            value_head_seed: of its initial weights.
            traits: of the policy's decoder, as `ResponseLM`.
            critic_traits: of the critic, likewise.

        Raises:
            InputError: the policy is not supported (see `ResponseLM`), or the critic looks ahead.
        """
        super().__init__(causal_lm, temperature=temperature, traits=traits)
        self.critic = critic
        self._critic_decoder = Decoder(critic, critic_traits)
        dtype = next(critic.parameters()).dtype
        self.value_head = make_value_head(self._critic_decoder.traits.hidden_size, dtype, value_head_seed)
        _move_to(self.value_head, self.device)

    @property
    def traits(self) -> Traits:
        """What was found out about the policy's decoder, as far as it holds for the critic's too."""
        own, other = self.decoder.traits, self._critic_decoder.traits
        packs, takes_bounds = own.packs and other.packs, own.takes_bounds and other.takes_bounds
        return replace(own, packs=packs, takes_bounds=takes_bounds)

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token and the value of the prefix before it."""
        return replace(super().forward(rows), values=self._estimate_values(rows))

    def forward_values(self, rows: PackedRows) -> torch.Tensor:
        """Compute the values `[B, R]` alone, with a gradient for the critic and its value head."""
        return self._estimate_values(rows)

    def value_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the critic and of its value head."""
        yield from self.critic.parameters()
        yield from super().value_parameters()

    def list_files(self, state: State) -> list[TensorFile]:
        """Return the files of policy, critic and value head, as `ActorCritic.list_files`."""
        folder = Path(CRITIC_FOLDER)
        critic = self._model_file(self.critic, folder, _select(state, "critic"))
        head = TensorFile(folder / VALUE_HEAD_FILE, _select(state, "value_head"), has_parts=False)
        return [*super().list_files(state), critic, head]

    def save_configs(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what a checkpoint holds of policy and critic beside their tensors."""
        super().save_configs(folder, dtype)
        self._save_config(self.critic, folder / CRITIC_FOLDER, dtype)

    def _estimate_values(self, rows: PackedRows) -> torch.Tensor:
        """Compute the values; `forward` cannot call `forward_values`, which fsdp2 hooks as a pass of its own."""
        return self._apply_value_head(self._critic_decoder.run(rows), rows)


class UnadaptedPolicy(ResponseLM):
    """A policy without its adapters, as its own frozen reference: a second model without memory of its own."""

    def __init__(self, policy: ActorCritic) -> None:
        """Take a policy with adapters."""
        torch.nn.Module.__init__(self)
        self._policy = [policy]  # in a list, so that its parameters are not this module's too
        self.temperature = policy.temperature

    @property
    def causal_lm(self) -> Any:
        """The policy's own, adapters included."""
        return self._policy[0].causal_lm

    @property
    def traits(self) -> Traits:
        """What was found out about the policy's decoder."""
        return self._policy[0].decoder.traits

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the frozen parameters, or their codes, by the names that they have without adapters."""
        from ppo_ray.models.lora import base_weights

        return base_weights(self.causal_lm)

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token, without gradient."""
        return self._policy[0].forward_reference(rows)


def make_value_head(hidden_size: int, dtype: torch.dtype, seed: int) -> torch.nn.Linear:
    """Make a linear map with torch's default initialisation, drawn from a seed of its own; float32 or better."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(hidden_size, 1).to(torch.promote_types(dtype, torch.float32))


def _move_to(head: torch.nn.Linear, device: torch.device) -> None:
    """Move a head to where its model is; beside a model on the meta device it stays where its values are."""
    if device.type != "meta":
        head.to(device)


def save_value_head(path: Path, state: State) -> None:
    """Write a value head's state as a safetensors file."""
    write_tensors(path, state)


def _select(state: State, module: str) -> State:
    """Select the state of a submodule, by its own names."""
    return {name.removeprefix(f"{module}."): tensor for name, tensor in state.items() if name.startswith(f"{module}.")}
