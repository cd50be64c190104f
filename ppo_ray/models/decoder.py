"""A transformers decoder over packed rows: hidden states where a response token is predicted, and nowhere else.

Dimensions: S rows, W tokens a row, N response tokens, H hidden.
"""

import inspect
from typing import Any

import numpy as np
import torch

from ppo_ray.errors import InputError
from ppo_ray.models.packing import PackedRows, pack

_AGREEMENT = 1e-3  # relative; a model that computes something else is off by the figures' own size


class Decoder:
    """Runs a model's layers; holds no parameters of its own."""

    def __init__(self, base_model: Any) -> None:
        """Look at what the model can do.

        Args:
            base_model: a transformers model without its head, on its device, in eval mode.

        Raises:
            InputError: the model looks ahead, as encoders do.
        """
        self._base_model = base_model
        self._takes_positions = "position_ids" in inspect.signature(base_model.forward).parameters
        self.packs = False
        self._check_causal()
        self.packs = self._can_pack()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._base_model.get_input_embeddings().weight.device

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self._base_model.config.get_text_config().hidden_size)

    def states(self, rows: PackedRows) -> torch.Tensor:
        """Return `[N, H]`, the last hidden state of the token before each response token."""
        packed = int(rows.segment_ids.max()) > 0
        if packed and not self.packs:
            raise ValueError("this model cannot have several sequences in a row; lay them out with row_width=0")
        positions = {"position_ids": rows.position_ids} if self._takes_positions else {}
        states = self._base_model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask(packed=self.packs),
            use_cache=False,
            **positions,
        ).last_hidden_state
        return states.flatten(0, 1)[rows.predict_at]

    @torch.no_grad()
    def _check_causal(self) -> None:
        """Check that a later token changes no earlier state: a figure of a prefix must not know what follows it."""
        tokens = np.arange(1, 7) % self._base_model.config.get_text_config().vocab_size
        first, second = (  # that of the later token itself, the last one, left out
            self.states(pack([[0]], [tokens[:2]], [np.append(tokens[2:4], [later, 0])], self.device))[:-1]
            for later in tokens[4:]
        )
        if not agree(first, second):
            name = self._base_model.config.name_or_path or type(self._base_model).__name__
            raise InputError(
                f"the model {name!r} looks ahead at later tokens; give a decoder, such as GPT-2, Llama or Qwen"
            )

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Tell whether several sequences may share a row: the model attends, and only where the mask lets it.

        Sliding windows, recurrent states and positions taken from the mask rule it out. Where nothing speaks against
        it, two short sequences are tried, together and alone.
        """
        config = self._base_model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        windowed = set(layer_types) != {"full_attention"} if layer_types else getattr(config, "sliding_window", None)
        if windowed or getattr(self._base_model, "_is_stateful", False) or not self._takes_positions:
            return False
        tokens = np.arange(1, 9) % config.vocab_size
        prompts, responses = [tokens[:2], tokens[3:5]], [tokens[2:3], tokens[5:8]]
        alone = [self.states(pack([[index]], prompts, responses, self.device)) for index in (0, 1)]
        self.packs = True
        try:
            together = self.states(pack([[0, 1]], prompts, responses, self.device))
        except (RuntimeError, ValueError, IndexError, TypeError):  # it cannot take a mask of four dimensions
            return False
        return agree(together, torch.cat(alone))


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Tell whether two computations of the same figures differ by no more than rounding."""
    return bool(torch.allclose(found, wanted, rtol=_AGREEMENT, atol=_AGREEMENT * float(wanted.abs().mean())))
