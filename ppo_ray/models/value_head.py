"""The policy: a causal language model whose last hidden state also feeds a value head."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ppo_ray.errors import InputError
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM, ResponseOutput, unflatten

VALUE_HEAD_FILE = "value_head.safetensors"
"""Lies in a checkpoint beside the model: `weight` `[1, H]` and `bias` `[1]`."""


class CausalLMWithValueHead(ResponseLM):
    """A transformers causal LM and a linear value head on its last hidden state; no dropout in either."""

    def __init__(
        self, causal_lm: Any, temperature: float = 1.0, compute_dtype: str = "float32", value_head_seed: int = 0
    ) -> None:
        """Add a value head with torch's default initialisation, drawn from a seed of its own.

        Args:
            causal_lm: on its device, in eval mode.
            temperature: divides the logits, never the values.
            compute_dtype: of the forward pass; the value head is in float32 or better.
            value_head_seed: of its initial weights.

        Raises:
            InputError: the model is not supported; see `ResponseLM`.
        """
        super().__init__(causal_lm, temperature, compute_dtype)
        weight = causal_lm.get_output_embeddings().weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(value_head_seed)
            head = torch.nn.Linear(weight.shape[1], 1)
        self.value_head = head.to(self.device, torch.promote_types(weight.dtype, torch.float32))

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token and the value of the prefix before it."""
        with self._autocast():
            hidden = self.predicting_states(rows)
            logprobs, entropies = self._head(hidden, rows)
        values = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        return ResponseOutput(unflatten(logprobs, rows), unflatten(entropies, rows), unflatten(values, rows))

    def load_value_head(self, path: Path) -> None:
        """Load the value head from a `value_head.safetensors`.

        Raises:
            InputError: the file is not a value head of this model's hidden size.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in self.value_head.state_dict().items()}
        tensors = safetensors.torch.load_file(path)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise InputError(f"{path} holds {found}, this model needs {wanted}; remove the file to start a new head")
        self.value_head.load_state_dict(tensors)

    def save_value_head(self, path: Path) -> None:
        """Write the value head; `load_value_head` reads it."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.value_head.state_dict().items()}
        safetensors.torch.save_file(tensors, path)
