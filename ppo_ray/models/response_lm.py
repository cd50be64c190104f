"""A causal language model over given responses: log-probabilities and entropies of their tokens.

The decoder runs over packed rows. The output embedding is applied only where a response token is predicted.

Dimensions: B sequences, R response tokens, N response tokens in all, H hidden units, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ppo_ray.errors import InputError
from ppo_ray.models.decoder import Decoder, agree
from ppo_ray.models.packing import PackedRows
from ppo_ray.models.support import CHOOSE, check_head, find_decoder

_BLOCK_TOKENS = 512
_CHUNK_TOKENS = 64

Logits = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Factors of logits: hidden states `[N, H]`, weight `[V, H]`, bias `[V]` or None."""


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

    def __init__(self, causal_lm: Any, *, temperature: float) -> None:
        """Wrap a loaded model.

        Args:
            causal_lm: on its device, in eval mode.
            temperature: divides the logits; the one at which the responses were sampled.

        Raises:
            InputError: the model looks ahead, or computes its logits in another way.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        check_head(causal_lm)
        self.decoder = Decoder(find_decoder(causal_lm))
        _check_logits(causal_lm)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.device

    @property
    def packs(self) -> bool:
        """Whether several sequences may lie in a row, and share what their prompts begin with."""
        return self.decoder.packs

    @property
    def takes_bounds(self) -> bool:
        """Whether sequences that lie end to end in one row need no mask."""
        return self.decoder.takes_bounds

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


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(logits / temperature)[token] and the entropy, with logits = hidden @ weight.T + bias.

    The product is in the weight's type, but on a GPU it is added up and kept in float32; the softmax is in float32 or
    better.

    Args:
        hidden: `[N, H]` floating point.
        weight: `[V, H]`.
        bias: `[V]` or None.
        token_ids: `[N]` int64.
        temperature: above 0.

    Returns:
        Log-probabilities `[N]` and entropies `[N]`, both with gradient; float32 or better. The backward pass can be run
        once.

    Raises:
        ValueError: a shape or the temperature is wrong.
    """
    if hidden.ndim != 2 or weight.shape[1:] != hidden.shape[1:] or token_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, token_ids {tuple(token_ids.shape)}: "
            "they must be [N, H], [V, H], [N]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; it must be above 0")
    return _TokenLogprobs.apply(hidden, weight, bias, token_ids, temperature, torch.is_grad_enabled())


@torch.no_grad()
def full_kl(policy: Logits, reference: Logits, temperature: float) -> torch.Tensor:
    """Compute KL(policy || reference) = sum_v p_v (log p_v - log q_v) of each token's distribution.

    TRL 0.11's `kl_penalty="full"`. The two models may differ in H, not in V or N.

    Args:
        policy: whose distribution is p.
        reference: whose distribution is q.
        temperature: divides both models' logits.

    Returns:
        `[N]` float32 or better, without gradient.
    """
    sizes = [(len(hidden), len(weight)) for hidden, weight, _ in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"(tokens, vocabulary) of policy and reference are {sizes[0]} and {sizes[1]}; they must agree")
    num_tokens = len(policy[0])
    kl = policy[0].new_empty(num_tokens, dtype=torch.promote_types(policy[0].dtype, torch.float32))
    for start in range(0, num_tokens, _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        logits = kl.new_empty(2, len(kl[chunk]), len(policy[1]))
        for out, (hidden, weight, bias) in zip(logits, (policy, reference), strict=True):
            _write_logits(out, hidden[chunk], weight, bias, temperature)
        logp, logq = logits.log_softmax(2)
        kl[chunk] = torch.linalg.vecdot(logp.exp(), logp - logq)
    return kl


def _write_logits(
    out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> None:
    """Compute logits over temperature into `out`, `[n, V]`, whose memory is there already."""
    if hidden.dtype == out.dtype and bias is None:
        torch.mm(hidden, weight.T, out=out)
    elif _keeps_float32(hidden):  # logits rounded to bfloat16 are 0.03 nats off; an engine on a GPU does the same
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        if bias is not None:
            out += bias
    else:
        out.copy_(torch.nn.functional.linear(hidden, weight, bias))
    if temperature != 1:
        out /= temperature


def _keeps_float32(hidden: torch.Tensor) -> bool:
    """Say whether a product of 16-bit tensors can be written in float32 without another copy: on a GPU."""
    return hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies with one tensor of `[N, V]`, the largest of an update.

    Logits are computed in blocks, large enough for a fast product, and turned into probabilities in place, in chunks
    that stay in cache. The probabilities are kept for the backward pass and there turned into their gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor,
        temperature: float,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, dtype = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropies = hidden.new_empty(num_tokens, dtype=dtype), hidden.new_empty(num_tokens, dtype=dtype)
        probs = hidden.new_empty(num_tokens if keep else min(num_tokens, _BLOCK_TOKENS), len(weight), dtype=dtype)
        scratch = hidden.new_empty(min(num_tokens, _CHUNK_TOKENS), len(weight), dtype=dtype)
        for start in range(0, num_tokens, _BLOCK_TOKENS):
            block = slice(start, min(start + _BLOCK_TOKENS, num_tokens))
            logits = probs[block] if keep else probs[: block.stop - start]
            _write_logits(logits, hidden[block], weight, bias, temperature)
            for begin, rows in zip(range(start, block.stop, _CHUNK_TOKENS), logits.split(_CHUNK_TOKENS), strict=True):
                chunk = slice(begin, begin + len(rows))
                rows -= rows.amax(1, keepdim=True)
                p = torch.exp(rows, out=scratch[: len(rows)])
                total = p.sum(1)
                log_total = total.log()
                logprobs[chunk] = rows.gather(1, token_ids[chunk, None])[:, 0] - log_total
                entropies[chunk] = log_total - torch.linalg.vecdot(p, rows) / total  # H = log Z - E[logit]
                if keep:
                    torch.div(p, total[:, None], out=rows)
        if keep:
            ctx.save_for_backward(hidden, weight, bias, token_ids, entropies)
            ctx.probs, ctx.temperature = probs, temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if ctx.probs is None:
            raise RuntimeError("the backward pass of token_logprobs was run before; it can be run once")
        hidden, weight, _, token_ids, entropies = ctx.saved_tensors
        grad_logits, ctx.probs = ctx.probs, None
        scale = torch.zeros_like(entropies) if grad_logprobs is None else grad_logprobs / ctx.temperature
        if grad_entropies is None:
            # d logprob / d logit_v = ([v = token] - p_v) / temperature
            grad_logits *= -scale[:, None]
        else:
            # and d entropy / d logit_v = -p_v (log p_v + entropy) / temperature
            for p, s, h, g in zip(
                *(x.split(_CHUNK_TOKENS) for x in (grad_logits, scale, entropies, grad_entropies / ctx.temperature)),
                strict=True,
            ):
                surprise = p.clamp(min=torch.finfo(p.dtype).tiny).log_().add_(h[:, None]).mul_(g[:, None])
                p *= surprise.add_(s[:, None]).neg_()
        grad_logits.scatter_add_(1, token_ids[:, None], scale[:, None])
        grad_logits = grad_logits.to(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            grad_logits @ weight if needs_hidden else None,
            grad_logits.T @ hidden if needs_weight else None,
            grad_logits.sum(0) if needs_bias else None,
            None,
            None,
            None,
        )
