"""Attention of sequences that lie end to end in one row, which is told their bounds and needs no mask.

A mask of T tokens has T^2 entries, and keeps torch from its fast kernels. Where nothing but causal attention within
each sequence is wanted, the places at which sequences begin say the same. They go through a transformers model in the
place of its mask, as a tensor of four dimensions, which it passes on as it is.

Dimensions: N sequences, T tokens of all, L of the longest; D units per head.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_NAME = "ppo_ray"
"""What transformers calls `attend`; with a mask, or none, it is transformers' own `sdpa`."""
_SHORT = 256
"""Tokens from which torch's attention on a CPU is faster in 16 bits than in float32. Of shorter sequences its backward
pass takes up to four times as long, half of an update; float32 is more exact, too."""


def make_bounds(lengths: Sequence[int]) -> torch.Tensor:
    """Say where sequences of these lengths begin, one after another, and where the last one ends.

    Args:
        lengths: tokens of each sequence, N of them.

    Returns:
        `[1, 1, N + 1, L]` int32 on the host, where it can be read without waiting for a GPU. The last dimension is
        there to say L; it has the stride 0.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return bounds[None, None, :, None].expand(-1, -1, -1, max(lengths))


def use_bounds(base_model: Any, is_right: Callable[[], bool]) -> bool:
    """Let a transformers model attend by `attend`, if it leaves the choice to us and computes the same.

    Args:
        base_model: without its head.
        is_right: tries it, by then.

    Returns:
        Whether it does so from now on. Not where it attends by something else than torch's function, or where its code
        asks for that by name: models do that choose the tokens to attend to.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    chosen = base_model.config._attn_implementation
    if chosen not in ("sdpa", _NAME) or not base_model._can_set_attn_implementation():
        return False
    if '"sdpa"' in inspect.getsource(sys.modules[type(base_model).__module__]):
        return False
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    base_model.set_attn_implementation(_NAME)
    if is_right():
        return True
    base_model.set_attn_implementation("sdpa")
    return False


@torch.compiler.disable  # it goes by the bounds' values, and has kernels of its own
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence to the tokens up to one's own, or as transformers' `sdpa` where there are no bounds.

    On a GPU, in 16 bits, this is one flash kernel for all sequences. On a CPU it is `_PaddedAttention` for sequences of
    at most D tokens. Else it is torch's causal attention, once for all sequences of one length that lie side by side.

    Args:
        module: a layer's attention.
        query: `[1, heads, T, D]`.
        key: `[1, key heads, T, D]`.
        value: as `key`.
        attention_mask: bounds, as of `make_bounds`; or a mask, `[S, 1, W, W]` bool or floating point, or None, for
            tensors of S rows of W tokens.
        **options: of transformers' attention functions.

    Returns:
        `[1, T, heads, D]`, and nothing.

    Raises:
        ValueError: the model wants more than causal attention, such as a window or a bias of positions.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return _attend_by_torch(module, (query, key, value), attention_mask, **options), None
    more = ("sliding_window", "position_bias", "cache", "s_aux", "softcap")
    beyond = [name for name in more if options.get(name) is not None]
    causal = options.get("is_causal") in (None, True) and getattr(module, "is_causal", True)
    if beyond or not causal or options.get("dropout") or len(query) > 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"bounds are for causal attention alone, of one row without a cache; the model has {beyond}")
    bounds, scale = attention_mask[0, 0, :, 0], options.get("scaling")
    if _takes_flash(query, key, value):
        from torch.nn.attention.varlen import varlen_attn

        longest, bounds = attention_mask.shape[3], bounds.contiguous().to(query.device, non_blocking=True)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        causal_window = (-1, 0)
        attended = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=causal_window, enable_gqa=True
        )
        assert isinstance(attended, torch.Tensor)
        return attended[None], None
    width = query.shape[3]
    padded_up_to = width if query.device.type == "cpu" else 0
    groups = _group([stop - start for start, stop in pairwise(bounds.tolist())], padded_up_to)
    split = (tensor[0].split([sum(group) for group in groups], 1) for tensor in (query, key, value))
    parts = []
    for group, *tensors in zip(groups, *split, strict=True):
        if max(group) <= padded_up_to:
            parts.append(_PaddedAttention.apply(*tensors, group, width**-0.5 if scale is None else scale))
        else:
            alone = [tensor.unflatten(1, (len(group), group[0])).transpose(0, 1) for tensor in tensors]
            parts.append(_attend_by_torch(module, alone, None, scaling=scale, is_causal=True).flatten(0, 1))
    return (torch.cat(parts) if len(parts) > 1 else parts[0])[None], None


def _group(lengths: Sequence[int], padded_up_to: int) -> list[list[int]]:
    """Split sequences into groups to attend to at once: of one length, or of any where padding is worth it.

    Args:
        lengths: tokens of each sequence.
        padded_up_to: sequences of at most so many tokens may be padded to the longest of their group, as long as at
            most half of the group is padding.

    Returns:
        The lengths, group by group, in their order.
    """
    groups: list[list[int]] = []
    longest = tokens = 0
    for length in lengths:
        wider = max(longest, length)
        fits = groups and wider <= padded_up_to and wider * (len(groups[-1]) + 1) <= 2 * (tokens + length)
        if fits or length == longest:
            groups[-1].append(length)
            longest, tokens = wider, tokens + length
        else:
            groups.append([length])
            longest = tokens = length
    return groups


class _PaddedAttention(torch.autograd.Function):
    """Causal attention of short sequences, padded to the longest, by products of many small matrices at once.

    Of bfloat16 sequences of some 20 tokens, torch's kernel for a CPU takes up to twice as long. The backward pass takes
    the probabilities that the forward pass kept: up to D tokens they are not more than the queries. Both passes compute
    in float32 or better.

    With S = scale Q K^T up to the diagonal and P = softmax(S), O = P V. So dV = P^T dO, dP = dO V^T,
    dS = P (dP - sum_j P_j dP_j), dQ = scale dS K, dK = scale dS^T Q. A padded query has P = 0, so no gradient comes
    from it; and no query sees a padded key, since these are behind all others.

    Dimensions: N sequences padded to L tokens, T without padding; K heads of keys, G queries' heads for each of them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float
    ) -> torch.Tensor:
        """Return `[T, K * G, D]` for a query `[K * G, T, D]`, and a key and a value `[K, T, D]`."""
        sizes, steps, heads = np.array(lengths), np.arange(max(lengths)), len(query) // len(key)
        inside = steps < sizes[:, None]
        starts = (sizes.cumsum() - sizes)[:, None]
        tokens = torch.from_numpy(np.where(inside, starts + steps, 0))  # [N, L]; padding is any token
        places, real = torch.from_numpy(np.flatnonzero(inside)), torch.from_numpy(inside)
        dtype = torch.promote_types(query.dtype, torch.float32)
        later = torch.full((len(steps), len(steps)), -torch.inf, dtype=dtype).triu_(1).repeat_interleave(heads, 0)
        q, k, v = (_pad(tensor, tokens, len(key), dtype) for tensor in (query, key, value))
        probs = torch.baddbmm(later, q, k.transpose(1, 2), alpha=scale).softmax(2)
        probs.unflatten(0, (len(lengths), -1)).mul_(real.repeat_interleave(heads, 1)[:, None, :, None])
        ctx.save_for_backward(query, key, value, tokens, places, probs)
        ctx.scale = scale
        return _unpad(probs @ v, tokens, places, query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, tokens, places, probs = ctx.saved_tensors
        tensors = query, key, value, grad.transpose(0, 1)
        q, k, v, grad_out = (_pad(tensor, tokens, len(key), probs.dtype) for tensor in tensors)
        grad_scores = grad_out @ v.transpose(1, 2)
        grad_scores -= torch.linalg.vecdot(probs, grad_scores)[..., None]
        grad_scores *= probs
        grad_scores *= ctx.scale
        products = grad_scores @ k, grad_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ grad_out
        return *(_unpad(one, tokens, places, query.dtype).transpose(0, 1) for one in products), None, None


def _pad(tensor: torch.Tensor, tokens: torch.Tensor, key_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Lay out `[K * G, T, D]` as `[N * K, L * G, D]` of another type; `tokens`, `[N, L]`, says which goes where."""
    rows = tensor.transpose(0, 1).flatten(1).index_select(0, tokens.flatten())
    laid_out = rows.view(*tokens.shape, key_heads, -1, tensor.shape[2]).transpose(1, 2)
    return torch.empty(laid_out.shape, dtype=dtype).copy_(laid_out).flatten(2, 3).flatten(0, 1)


def _unpad(padded: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `[T, K * G, D]` of `[N * K, L * G, D]`: the tokens at `places`, `[T]`, flat indices into `[N, L]`."""
    number, longest = tokens.shape
    laid_out = padded.view(number, len(padded) // number, longest, -1, padded.shape[2]).transpose(1, 2)
    rows = torch.empty(laid_out.shape, dtype=dtype).copy_(laid_out).view(number * longest, -1, padded.shape[2])
    return rows.index_select(0, places)


def _attend_by_torch(
    module: torch.nn.Module, tensors: Sequence[torch.Tensor], mask: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """Attend as transformers' `sdpa`, on a CPU to short sequences of 16 bits in float32: see `_SHORT`.

    Args:
        module: as in `attend`.
        tensors: queries, keys and values.
        mask: of them, or None.
        **options: as in `attend`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, dtype = tensors[0], tensors[0].dtype
    if query.device.type == "cpu" and dtype.itemsize == 2 and query.shape[2] < _SHORT:
        tensors = [tensor.float() for tensor in tensors]
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    attended, _ = sdpa_attention_forward(module, *tensors, mask, **options)
    return attended.to(dtype)


def _takes_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Say whether torch's flash kernel takes these: on an Ampere GPU or a later one, in 16 bits, of heads it knows."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == key.shape[-1] == value.shape[-1]
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
