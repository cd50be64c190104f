"""The policy: a causal language model whose last hidden state also feeds a value head."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ppo_ray.errors import InputError
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM, ResponseOutput, unflatten

State = dict[str, torch.Tensor]
"""A module's parameters and buffers by name, as `state_dict` has them."""
VALUE_HEAD_FILE = Path("value_head") / "value_head.safetensors"
"""Lies in a checkpoint below the model: `weight` `[1, H]` and `bias` `[1]`. In a folder of its own, because vLLM loads
every safetensors file of a model's folder as a part of the model."""


class CausalLMWithValueHead(ResponseLM):
    """A transformers causal LM and a linear value head on its last hidden state; no dropout in either."""

    def __init__(
        self,
        causal_lm: Any,
        temperature: float = 1.0,
        value_head: torch.nn.Linear | None = None,
        value_head_seed: int = 0,
    ) -> None:
        """Add a value head, one's own or a new one.

        Args:
            causal_lm: on its device, in eval mode.
            temperature: divides the logits, never the values.
            value_head: from H to 1; None: a new one, see `new_value_head`.
            value_head_seed: of its initial weights.

        Raises:
            InputError: the model is not supported; see `ResponseLM`.
        """
        super().__init__(causal_lm, temperature)
        weight = causal_lm.get_output_embeddings().weight
        self.value_head = value_head or new_value_head(weight.shape[1], weight.dtype, value_head_seed)
        self.value_head.to(self.device)

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token and the value of the prefix before it."""
        output = super().forward(rows)
        return replace(output, values=apply_value_head(self.value_head, output.states, rows))

    def forward_values(self, rows: PackedRows) -> torch.Tensor:
        """Compute the values `[B, R]` alone, with a gradient for the value head alone."""
        with torch.no_grad():
            states = self.decoder.states(rows)
        return apply_value_head(self.value_head, states, rows)

    def policy_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the causal LM's parameters."""
        return self.causal_lm.parameters()

    def value_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the value head's parameters."""
        return self.value_head.parameters()

    def load_values(self, folder: Path) -> None:
        """Load the value head from a checkpoint, if there is one in it.

        Raises:
            InputError: the file is not a value head of this model's hidden size.
        """
        load_value_head(self.value_head, folder)

    def save(self, folder: Path, state: State) -> None:
        """Write policy and value head into a checkpoint, from a whole state of this module."""
        save_model(self.causal_lm, folder, part_of(state, "causal_lm"))
        save_value_head(folder / VALUE_HEAD_FILE, part_of(state, "value_head"))


def new_value_head(hidden_size: int, dtype: torch.dtype, seed: int) -> torch.nn.Linear:
    """Make a linear map with torch's default initialisation, drawn from a seed of its own; float32 or better."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(hidden_size, 1).to(torch.promote_types(dtype, torch.float32))


def apply_value_head(value_head: torch.nn.Linear, states: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    """Compute values `[B, R]` from hidden states `[N, H]`; zero outside the mask."""
    return unflatten(value_head(states.to(value_head.weight.dtype))[:, 0], rows)


def load_value_head(value_head: torch.nn.Linear, folder: Path) -> None:
    """Load the value head that lies in a folder, if there is one.

    Raises:
        InputError: the file is not a value head of this size.
    """
    path = folder / VALUE_HEAD_FILE
    if not path.is_file():
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in value_head.state_dict().items()}
    tensors = safetensors.torch.load_file(path)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise InputError(f"{path} holds {found}, this model needs {wanted}; remove the file to start a new head")
    value_head.load_state_dict(tensors)


def save_value_head(path: Path, state: State) -> None:
    """Write a value head's state as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, path)


def save_model(model: Any, folder: Path, state: State) -> None:
    """Write a transformers model's state for `from_pretrained`; the config says the type of what is written."""
    model.save_pretrained(folder, state_dict=dict(state))
    model.config.dtype = next(iter(state.values())).dtype
    model.config.save_pretrained(folder)


def part_of(state: State, module: str) -> State:
    """Return the state of a submodule, by its own names."""
    return {name.removeprefix(f"{module}."): tensor for name, tensor in state.items() if name.startswith(f"{module}.")}
