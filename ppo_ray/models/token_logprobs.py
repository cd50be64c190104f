"""Log-probabilities of given tokens from hidden states, without needless copies of `[N, V]`.

Dimensions: N tokens, H hidden, V vocabulary. The logits of N tokens are the largest tensor of an update. They are made
in chunks that stay in cache, turned into probabilities in place, kept once for the backward pass, and there turned into
their own gradient in place. The entropy falls out of the same pass.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_CHUNK_TOKENS = 64


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(logits / temperature)[token] and the entropy, with logits = hidden @ weight.T + bias.

    Under autocast the product is in autocast's type; the softmax is in float32 or better.

    Args:
        hidden: `[N, H]` floating point.
        weight: `[V, H]`.
        bias: `[V]` or None.
        token_ids: `[N]` int64.
        temperature: above 0.

    Returns:
        Log-probabilities `[N]` with gradient, entropies `[N]` without; float32 or better. The backward pass can be run
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
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden, weight, bias, token_ids, temperature, torch.is_grad_enabled())


class _TokenLogprobs(torch.autograd.Function):
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
        probs = hidden.new_empty(num_tokens if keep else min(num_tokens, _CHUNK_TOKENS), len(weight), dtype=dtype)
        for start in range(0, num_tokens, _CHUNK_TOKENS):
            chunk = slice(start, min(start + _CHUNK_TOKENS, num_tokens))
            logits = torch.nn.functional.linear(hidden[chunk], weight, bias).to(dtype).div_(temperature)
            logits -= logits.amax(1, keepdim=True)
            p = torch.exp(logits, out=probs[chunk] if keep else probs[: len(logits)])
            total = p.sum(1)
            log_total = total.log()
            logprobs[chunk] = logits.gather(1, token_ids[chunk, None])[:, 0] - log_total
            entropies[chunk] = log_total - torch.linalg.vecdot(p, logits) / total  # H = log Z - E[logit]
            if keep:
                p /= total[:, None]
        if keep:
            ctx.save_for_backward(hidden, weight, bias, token_ids)
            ctx.probs, ctx.temperature = probs, temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.probs is None:
            raise RuntimeError("the backward pass of token_logprobs was run before; it can be run once")
        hidden, weight, bias, token_ids = ctx.saved_tensors
        # d logprob / d logit_v = ([v = token] - p_v) / temperature
        grad_logits, ctx.probs = ctx.probs, None
        scale = (grad_logprobs / ctx.temperature)[:, None]
        grad_logits *= -scale
        grad_logits.scatter_add_(1, token_ids[:, None], scale)
        grad_bias = None if bias is None else grad_logits.sum(0).to(bias.dtype)
        grad_logits = grad_logits.to(hidden.dtype)
        return grad_logits @ weight, grad_logits.T @ hidden, grad_bias, None, None, None
