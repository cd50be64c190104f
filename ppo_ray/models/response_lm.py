"""A causal language model over given responses: log-probabilities and entropies of their tokens.

The decoder runs over packed rows. The output embedding is applied only where a response token is predicted.

Dimensions: B sequences, R response tokens, N response tokens in all, H hidden units, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ppo_ray.errors import InputError
from ppo_ray.models.decoder import Decoder, Traits, agree
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.support import CHOOSE, check_head, find_decoder
from ppo_ray.models.token_logprobs import full_kl, token_logprobs


@dataclass(frozen=True)
class ResponseOutput:
    """Outputs of one forward pass for its response tokens; all `[B, R]` are zero outside the mask."""

    logprobs: torch.Tensor
    """`[B, R]`, float32 or better."""
    entropies: torch.Tensor
    """`[B, R]`, of the distribution each token was drawn from."""
    states: torch.Tensor
    """`[N, H]`, the decoder's last hidden state of the token before each response token."""
    values: torch.Tensor | None = None
    """`[B, R]`, of the prefix before each token; None for a model without values."""


class ResponseLM(torch.nn.Module):
    """A transformers causal LM with a forward pass over `PackedRows`.

    The logits must be the output embedding applied to the last hidden state.
    """

    def __init__(self, causal_lm: Any, *, temperature: float, traits: Traits | None = None) -> None:
        """Wrap a loaded model.

        Args:
            causal_lm: on its device, in eval mode.
            temperature: divides the logits; the one at which the responses were sampled.
            traits: of its decoder, if the model was wrapped before and passed; it may then be on the meta device.

        Raises:
            InputError: the model looks ahead, or computes its logits in another way.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        check_head(causal_lm)
        self.decoder = Decoder(find_decoder(causal_lm), traits)
        if traits is None:
            _check_logits(causal_lm)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.device

    @property
    def traits(self) -> Traits:
        """What was found out about the decoder."""
        return self.decoder.traits

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters of the causal LM by its names; under fsdp2, shards of them."""
        return self.causal_lm.named_parameters()

    def forward(self, rows: PackedRows) -> ResponseOutput:
        """Compute the log-probability and entropy of each response token, both with gradient."""
        states = self.decoder.run(rows)
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
    shape = rows.response_mask.shape
    return flat.new_zeros(shape.numel()).index_copy(0, rows.places, flat).view(shape)


@torch.no_grad()
def _check_logits(causal_lm: Any) -> None:
    """Check on three tokens that the logits are the output embedding applied to the decoder's last hidden state.

    Raises:
        InputError: they are not (BERT and Electra have layers in between), so the log-probabilities computed here would
            not be the model's.
    """
    head = causal_lm.get_output_embeddings()
    input_ids = torch.arange(1, 4, device=head.weight.device)[None] % len(head.weight)
    logits = causal_lm(input_ids=input_ids, use_cache=False).logits
    states = find_decoder(causal_lm)(input_ids=input_ids, use_cache=False).last_hidden_state
    if states.shape[-1] != head.weight.shape[1] or not agree(logits, head(states)):
        name = causal_lm.config.name_or_path or type(causal_lm).__name__
        raise InputError(
            f"the model {name!r} has more between its last hidden state and its logits than a linear output embedding "
            f"({type(causal_lm).__name__}'s forward method); the learner does not. {CHOOSE}"
        )
