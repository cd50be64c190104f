"""The output embedding and the softmax over it: log-probabilities and entropies of tokens, and the full KL.

Dimensions: N response tokens, H hidden units, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_KEPT_ENTRIES = 1 << 28
"""Probabilities that a forward pass keeps for its backward pass, at most: 1 GiB in float32. Of more tokens the logits
are computed twice, a product of four instead of three: 30 % more time for the head, some percent of an update."""

_LOG2_E = math.log2(math.e)
"""A power of 2 takes a CPU a quarter of the time of a power of e, and is as exact."""

Logits = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Factors of logits: hidden states `[N, H]`, weight `[V, H]`, bias `[V]` or None."""


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(logits / temperature)[token] and the entropy, with logits = hidden @ weight.T + bias.

    The product is in the weight's type, but on a GPU it is added up and kept in float32; the softmax is in float32 or
    better. A logit may be -inf, which is a token that is never drawn.

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

    TRL 0.11's `kl_penalty="full"`. The two models may differ in H, not in V or N. Where p_v is 0 its term is 0.

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
    hidden, num_entries = policy[0], len(policy[1])
    kl = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    block_rows, chunk_rows = count_rows(hidden.device, num_entries)
    both = kl.new_empty(2, min(len(hidden), block_rows), num_entries)
    for block in _split(slice(0, len(hidden)), block_rows):
        logits = both[:, : block.stop - block.start]
        for out, (states, weight, bias) in zip(logits, (policy, reference), strict=True):
            _write_logits(out, states[block], weight, bias)
        for chunk, rows in zip(_split(block, chunk_rows), logits.split(chunk_rows, dim=1), strict=True):
            _divide(rows, temperature)
            logp, logq = rows.log_softmax(2)
            p, difference = logp.exp(), logp - logq
            if policy[2] is not None or reference[2] is not None:
                difference.masked_fill_(p == 0, 0)  # a bias may be -inf
            kl[chunk] = torch.linalg.vecdot(p, difference)
    return kl


def count_rows(device: torch.device, num_entries: int) -> tuple[int, int]:
    """Return the tokens whose logits are computed in one product, and those of them that one operation works on.

    On a CPU a product is fast from some hundred tokens on, and an operation on what is in cache: 2 MiB per thread. On
    a GPU every product reads the weight anew, and the float32 sum of its gradient, which is little beside 1 GiB of
    logits; and an operation on 256 MiB takes much longer than its launch.

    Args:
        device: of the logits.
        num_entries: V.
    """
    if device.type == "cpu":
        return 512, max(1, (torch.get_num_threads() << 19) // num_entries)
    return max(1, (1 << 28) // num_entries), max(1, (1 << 26) // num_entries)


def _split(rows: slice, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def _write_logits(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Compute logits into `out`, `[n, V]`, whose memory is there already."""
    if hidden.dtype == out.dtype and bias is None:
        torch.mm(hidden, weight.T, out=out)
    elif _keeps_float32(hidden):  # logits rounded to bfloat16 are 0.03 nats off; an engine on a GPU does the same
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        if bias is not None:
            out += bias
    else:
        out.copy_(torch.nn.functional.linear(hidden, weight, bias))


def _divide(logits: torch.Tensor, temperature: float) -> None:
    if temperature != 1:
        logits /= temperature


def _keeps_float32(hidden: torch.Tensor) -> bool:
    """Say whether a product of 16-bit tensors can be written in float32 without another copy: on a GPU."""
    return hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies whose memory has a limit.

    Logits are computed in blocks, large enough for a fast product, and turned into probabilities in place, in chunks
    that stay in cache. Up to `_KEPT_ENTRIES` the probabilities are kept for the backward pass, and there turned into
    their gradient in place. Beyond it only each token's largest logit and normaliser are, and the backward pass
    computes the logits of one block after the other again.
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
        logprobs, entropies, largest, totals = (hidden.new_empty(num_tokens, dtype=dtype) for _ in range(4))
        whole = keep and num_tokens * len(weight) <= _KEPT_ENTRIES
        block_rows, chunk_rows = count_rows(hidden.device, len(weight))
        probs = hidden.new_empty(num_tokens if whole else min(num_tokens, block_rows), len(weight), dtype=dtype)
        scratch = hidden.new_empty(min(num_tokens, chunk_rows), len(weight), dtype=dtype)
        for block in _split(slice(0, num_tokens), block_rows):
            logits = probs[block] if whole else probs[: block.stop - block.start]
            _write_logits(logits, hidden[block], weight, bias)
            for chunk, rows in zip(_split(block, chunk_rows), logits.split(chunk_rows), strict=True):
                _divide(rows, temperature)
                torch.amax(rows, 1, out=largest[chunk])
                rows -= largest[chunk, None]
                own = rows.gather(1, token_ids[chunk, None])[:, 0]
                rows *= _LOG2_E
                p = torch.exp2(rows, out=scratch[: len(rows)])
                total = torch.sum(p, 1, out=totals[chunk])
                log_total = total.log()
                logprobs[chunk] = own - log_total
                _bound(rows, bias)
                entropies[chunk] = log_total - torch.linalg.vecdot(p, rows) / (total * _LOG2_E)  # log Z - E[logit]
                if whole:
                    torch.div(p, total[:, None], out=rows)
        if keep:
            ctx.save_for_backward(hidden, weight, bias, token_ids, entropies, largest, totals)
            ctx.probs, ctx.temperature, ctx.whole = probs if whole else None, temperature, whole
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if ctx.whole and ctx.probs is None:
            raise RuntimeError("the backward pass of token_logprobs was run before; it can be run once")
        entropies = ctx.saved_tensors[4]
        scale = torch.zeros_like(entropies) if grad_logprobs is None else grad_logprobs / ctx.temperature
        grad_hidden, *others = _sum_gradients(ctx, scale, grad_entropies)
        dtype = ctx.saved_tensors[1].dtype
        return grad_hidden, *(None if other is None else other.to(dtype) for other in others), None, None, None


def _sum_gradients(
    ctx: Any, scale: torch.Tensor, grad_entropies: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of hidden states, weight and bias; those of several blocks are added up in float32."""
    hidden, weight, bias, token_ids, entropies, largest, totals = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    block_rows, chunk_rows = count_rows(hidden.device, len(weight))
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    if ctx.whole:
        buffer, ctx.probs, block_rows = ctx.probs, None, max(len(hidden), 1)
    else:
        buffer = entropies.new_empty(min(len(hidden), block_rows), len(weight))
        grad_weight = torch.zeros_like(weight, dtype=entropies.dtype) if needs_weight else None
    for block in _split(slice(0, len(hidden)), block_rows):
        grad_logits = buffer[: block.stop - block.start]
        if not ctx.whole:
            _write_logits(grad_logits, hidden[block], weight, bias)
        for chunk in _split(block, chunk_rows):
            rows = grad_logits[chunk.start - block.start : chunk.stop - block.start]
            if not ctx.whole:
                _divide(rows, ctx.temperature)
                rows.sub_(largest[chunk, None]).mul_(_LOG2_E).exp2_().div_(totals[chunk, None])
            # d logprob / d logit_v = ([v = token] - p_v) / temperature
            factor = -scale[chunk, None]
            if grad_entropies is not None:
                # and d entropy / d logit_v = -p_v (log p_v + entropy) / temperature
                surprise = rows.clamp(min=torch.finfo(rows.dtype).tiny).log_().add_(entropies[chunk, None])
                factor = surprise.mul_(grad_entropies[chunk, None] / -ctx.temperature).add_(factor)
            rows *= factor
            rows.scatter_add_(1, token_ids[chunk, None], scale[chunk, None])
        if ctx.whole:
            del buffer, rows  # the copy in the type of the states is enough for the products
        grad_logits = grad_logits.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad_logits, weight, out=grad_hidden[block])
        if needs_weight:
            grad_weight = _add_product(grad_weight, grad_logits.T, hidden[block])
        if needs_bias:
            total = grad_logits.sum(0, dtype=None if ctx.whole else entropies.dtype)
            grad_bias = total if grad_bias is None else grad_bias + total
    return grad_hidden, grad_weight, grad_bias


def _bound(logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Make -inf, which only a bias brings, a number whose product with its probability, 0, is 0."""
    if bias is not None:
        logits.clamp_(min=torch.finfo(logits.dtype).min)


def _add_product(total: torch.Tensor | None, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Add one @ other to a sum in float32 or better, in place; without one return the product alone, in its type."""
    if total is None:
        return one @ other
    if total.dtype == one.dtype:
        return total.addmm_(one, other)
    if _keeps_float32(one):
        return torch.addmm(total, one, other, out_dtype=torch.float32, out=total)
    return total.add_(one @ other)
