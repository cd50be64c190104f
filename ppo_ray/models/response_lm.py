"""A causal language model that is asked about given responses only: the decoder runs, the head is applied where needed.

Dimensions: B sequences, R response tokens, N response tokens in all, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ppo_ray.errors import InputError
from ppo_ray.models.decoder import Decoder, agree
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.token_logprobs import full_kl, token_logprobs

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class ResponseOutput:
    """Figures of the response tokens of one forward pass; all zero outside the mask."""

    logprobs: torch.Tensor
    """`[B, R]`, float32 or better."""
    entropies: torch.Tensor
    """`[B, R]`, of the distribution each token was drawn from."""
    states: torch.Tensor
    """`[N, H]`, the decoder's last hidden state of the token before each response token."""
    values: torch.Tensor | None = None
    """`[B, R]`, of the prefix before each token; None where nothing estimates values."""


class ResponseLM(torch.nn.Module):
    """A transformers causal LM with a forward pass over `PackedRows`.

    Works for decoders whose logits are the output embedding applied to the last hidden state.
    """

    def __init__(self, causal_lm: Any, temperature: float = 1.0) -> None:
        """Wrap a loaded model.

        Args:
            causal_lm: on its device, in eval mode.
            temperature: divides the logits; the one that responses were sampled at.

        Raises:
            InputError: the model's logits are computed in a way that is not supported.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        check_logits(causal_lm)
        self.decoder = Decoder(causal_lm.base_model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.device

    @property
    def packs(self) -> bool:
        """Whether several sequences may share a row."""
        return self.decoder.packs

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token, both with gradient."""
        states = self.decoder.states(rows)
        head = self.causal_lm.get_output_embeddings()
        logprobs, entropies = token_logprobs(states, head.weight, head.bias, rows.target_ids, self.temperature)
        return ResponseOutput(unflatten(logprobs, rows), unflatten(entropies, rows), states)

    def full_kl(self, states: torch.Tensor, reference: "ResponseLM", ref_states: torch.Tensor) -> torch.Tensor:
        """Compute KL(this || reference) over the whole vocabulary from both models' hidden states, `[N, H]` each.

        Returns:
            `[N]`, without gradient.
        """
        head, ref_head = (model.causal_lm.get_output_embeddings() for model in (self, reference))
        return full_kl((states, head.weight, head.bias), (ref_states, ref_head.weight, ref_head.bias), self.temperature)


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
    if not agree(logits, head(causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)):
        config = causal_lm.config.get_text_config()
        found = {key: value for key in _LOGIT_TRANSFORMS if (value := getattr(config, key, None)) not in (None, 1)}
        raise InputError(
            f"the model {name!r} changes its logits after the output embedding ({found or 'in its forward method'}); "
            "the learner does not. Choose a model without it, such as GPT-2, Llama or Qwen."
        )
