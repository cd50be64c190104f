"""The policy beside a separate critic: values from a decoder of their own, out of the policy gradient's way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ppo_ray.models.decoder import Decoder
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.response_lm import ResponseLM, ResponseOutput
from ppo_ray.models.value_head import (
    VALUE_HEAD_FILE,
    State,
    apply_value_head,
    load_value_head,
    new_value_head,
    part_of,
    save_model,
    save_value_head,
)

CRITIC_FOLDER = "critic"
"""Lies in a checkpoint beside the policy: the critic's decoder, for `AutoModel.from_pretrained`, and its value head."""


class CausalLMWithCritic(ResponseLM):
    """A transformers causal LM, and a decoder with a linear value head that estimates its values."""

    def __init__(
        self,
        causal_lm: Any,
        critic: Any,
        temperature: float = 1.0,
        value_head_seed: int = 0,
    ) -> None:
        """Put the two beside one another.

        Args:
            causal_lm: the policy, on its device, in eval mode.
            critic: a transformers model without a head that reads the policy's tokens, on the same device.
            temperature: divides the logits, never the values.
            value_head_seed: of its initial weights.

        Raises:
            InputError: the policy is not supported (see `ResponseLM`), or the critic looks ahead.
        """
        super().__init__(causal_lm, temperature)
        self.critic = critic
        self._critic_decoder = Decoder(critic)
        dtype = critic.get_input_embeddings().weight.dtype
        self.value_head = new_value_head(self._critic_decoder.hidden_size, dtype, value_head_seed).to(self.device)

    @property
    def packs(self) -> bool:
        """Whether several sequences may share a row, in both decoders."""
        return self.decoder.packs and self._critic_decoder.packs

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token and the value of the prefix before it."""
        return replace(super().forward(rows), values=self._values(rows))

    def forward_values(self, rows: PackedRows) -> torch.Tensor:
        """Compute the values `[B, R]` alone, with a gradient for the critic."""
        return self._values(rows)

    def policy_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the causal LM's parameters."""
        return self.causal_lm.parameters()

    def value_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the critic and of its value head."""
        yield from self.critic.parameters()
        yield from self.value_head.parameters()

    def load_values(self, folder: Path) -> None:
        """Load the value head that lies with the critic's decoder, if there is one.

        Raises:
            InputError: the file is not a value head of this critic's hidden size.
        """
        load_value_head(self.value_head, folder)

    def save(self, folder: Path, state: State) -> None:
        """Write policy, critic and value head into a checkpoint, from a whole state of this module."""
        save_model(self.causal_lm, folder, part_of(state, "causal_lm"))
        save_model(self.critic, folder / CRITIC_FOLDER, part_of(state, "critic"))
        save_value_head(folder / CRITIC_FOLDER / VALUE_HEAD_FILE, part_of(state, "value_head"))

    def _values(self, rows: PackedRows) -> torch.Tensor:
        return apply_value_head(self.value_head, self._critic_decoder.states(rows), rows)
