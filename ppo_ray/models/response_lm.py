"""A causal language model that is asked about given responses only: the decoder runs, the head is applied where needed.

Dimensions: S rows, W tokens a row, B sequences, R response tokens, N response tokens in all, H hidden.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ppo_ray.errors import InputError
from ppo_ray.models.packing import PackedRows, pack
from ppo_ray.models.token_logprobs import token_logprobs

_AGREEMENT = 1e-3  # relative; a model that computes something else is off by the figures' own size
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class ResponseOutput:
    """Figures of the response tokens of one forward pass; all zero outside the mask."""

    logprobs: torch.Tensor
    """`[B, R]`, float32 or better."""
    entropies: torch.Tensor
    """`[B, R]`, of the distribution each token was drawn from; without gradient."""
    values: torch.Tensor | None = None
    """`[B, R]`, of the prefix before each token; None where there is no value head."""


class ResponseLM(torch.nn.Module):
    """A transformers causal LM with a forward pass over `PackedRows`.

    Works for decoders whose logits are the output embedding applied to the last hidden state.
    """

    def __init__(self, causal_lm: Any, temperature: float = 1.0, compute_dtype: str = "float32") -> None:
        """Wrap a loaded model.

        Args:
            causal_lm: on its device, in eval mode.
            temperature: divides the logits; the one that responses were sampled at.
            compute_dtype: `"bfloat16"` runs the forward pass under autocast; parameters stay as they are.

        Raises:
            InputError: the model's logits are computed in a way that is not supported.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self._compute_dtype = getattr(torch, compute_dtype)
        self._takes_positions = "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters
        check_logits(causal_lm)
        self.packs = self._can_pack()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.causal_lm.get_output_embeddings().weight.device

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token."""
        with self._autocast():
            logprobs, entropies = self._head(self.predicting_states(rows), rows)
        return ResponseOutput(unflatten(logprobs, rows), unflatten(entropies, rows))

    def predicting_states(self, rows: PackedRows) -> torch.Tensor:
        """Run the decoder; return `[N, H]`, the last hidden state of the token before each response token."""
        packed = int(rows.segment_ids.max()) > 0
        if packed and not self.packs:
            raise ValueError("this model cannot have several sequences in a row; lay them out with row_width=0")
        positions = {"position_ids": rows.position_ids} if self._takes_positions else {}
        states = self.causal_lm.base_model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask(packed=self.packs),
            use_cache=False,
            **positions,
        ).last_hidden_state
        return states.flatten(0, 1)[rows.predict_at]

    def _head(self, hidden: torch.Tensor, rows: PackedRows) -> tuple[torch.Tensor, torch.Tensor]:
        head = self.causal_lm.get_output_embeddings()
        return token_logprobs(hidden, head.weight, head.bias, rows.target_ids, self.temperature)

    def _autocast(self) -> AbstractContextManager[None]:
        stored = self.causal_lm.get_output_embeddings().weight.dtype
        if self._compute_dtype not in (torch.bfloat16, torch.float16) or self._compute_dtype == stored:
            return nullcontext()
        return torch.autocast(self.device.type, self._compute_dtype)

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Tell whether several sequences may share a row: the model attends, and only where the mask lets it.

        Sliding windows, recurrent states and positions taken from the mask rule it out. Where nothing speaks against
        it, two short sequences are tried, together and alone.
        """
        config = self.causal_lm.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        windowed = set(layer_types) != {"full_attention"} if layer_types else getattr(config, "sliding_window", None)
        if windowed or getattr(self.causal_lm, "_is_stateful", False) or not self._takes_positions:
            return False
        tokens = np.arange(1, 9) % config.vocab_size
        prompts, responses = [tokens[:2], tokens[3:5]], [tokens[2:3], tokens[5:8]]
        self.packs = False
        alone = [self.predicting_states(pack([[index]], prompts, responses, self.device)) for index in (0, 1)]
        self.packs = True
        try:
            together = self.predicting_states(pack([[0, 1]], prompts, responses, self.device))
        except (RuntimeError, ValueError, IndexError, TypeError):  # it cannot take a mask of four dimensions
            return False
        return _agree(together, torch.cat(alone))


def unflatten(flat: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    """Turn `[N]` into `[B, R]`, zero outside the response mask."""
    return flat.new_zeros(rows.response_mask.shape).masked_scatter(rows.response_mask, flat)


@torch.no_grad()
def check_logits(causal_lm: Any) -> None:
    """Check on three tokens that the logits are the output embedding applied to the decoder's last hidden state.

    Raises:
        InputError: they are not (Gemma 2 caps them, Cohere and Granite scale them), so the log-probabilities computed
            here would not be the model's.
    """
    head = causal_lm.get_output_embeddings()
    name = causal_lm.config.name_or_path or type(causal_lm).__name__
    if not isinstance(head, torch.nn.Linear):
        raise InputError(f"the model {name!r} has no linear output embedding; give a causal language model with one")
    input_ids = torch.arange(1, 4, device=head.weight.device)[None] % len(head.weight)
    logits = causal_lm(input_ids=input_ids, use_cache=False).logits
    if not _agree(logits, head(causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)):
        config = causal_lm.config.get_text_config()
        found = {key: value for key in _LOGIT_TRANSFORMS if (value := getattr(config, key, None)) not in (None, 1)}
        raise InputError(
            f"the model {name!r} changes its logits after the output embedding ({found or 'in its forward method'}); "
            "the learner does not. Choose a model without it, such as GPT-2, Llama or Qwen."
        )


def _agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(torch.allclose(found, wanted, rtol=_AGREEMENT, atol=_AGREEMENT * float(wanted.abs().mean())))
