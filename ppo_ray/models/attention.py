"""Attention of sequences that lie end to end in one row, which is told their bounds and needs no mask.

A mask of T tokens has T^2 entries, and keeps torch from its fast kernels. Where nothing but causal attention within
each sequence is wanted, the places at which sequences begin say the same. They go through a transformers model in the
place of its mask, as a tensor of four dimensions, which it passes on as it is.

Dimensions: N sequences, T tokens of all, L of the longest; D units per head.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from ppo_ray.models.block_attention import attend_in_blocks, pads_up_to

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

    On a GPU, in 16 bits, this is one flash kernel for all sequences. On a CPU it is `attend_in_blocks`, up to the
    length to which that is faster. Else it is torch's causal attention, once for all sequences of one length that lie
    side by side.

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
    limit = pads_up_to(query, key)
    groups = _group(bounds.diff().tolist(), limit)
    parts = []
    for lengths, q, k, v in zip(groups, *(_cut(tensor[0], groups) for tensor in (query, key, value)), strict=True):
        if max(lengths) <= limit:
            parts.append(attend_in_blocks(q, k, v, lengths, query.shape[3] ** -0.5 if scale is None else scale))
        else:
            alone = [tensor.unflatten(1, (len(lengths), lengths[0])).transpose(0, 1) for tensor in (q, k, v)]
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


def _cut(tensor: torch.Tensor, groups: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
    """Cut `[heads, T, D]` into the groups' tokens; a single one would be copied in the backward pass of `split`."""
    return tensor.split([sum(lengths) for lengths in groups], 1) if len(groups) > 1 else [tensor]


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
