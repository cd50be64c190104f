"""Causal attention on a CPU to sequences that lie end to end, by products of many small matrices at once.

Torch's kernel takes one sequence at a time, and needs up to twice the time. Here sequences are padded to the longest,
and sorted by length, the longest first. So the sequences that reach a block of tokens are the first ones. A block's
queries see the keys up to the block's end, so about half of all scores are computed. Both passes compute in float32 or
better.

With S = scale Q K^T up to the diagonal and P = softmax(S), O = P V. So dV = P^T dO, dP = dO V^T,
dS = P (dP - sum_j P_j dP_j), dQ = scale dS K, dK = scale dS^T Q. From a padded query comes no gradient: its dO is 0.
And no query sees a padded key, since these are behind all others.

Dimensions: N sequences padded to L tokens, T without padding; K heads of keys, G queries' heads for each of them; D
units per head; M = N * K matrices, of which a block of B tokens has those of the sequences that reach it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, cast

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_BLOCK = 32
"""Tokens of a block, if heads share keys; else a sequence is one block."""
_LONGEST = 512
"""Tokens of a sequence, at most, if heads share keys; of longer ones torch's kernel is as fast."""
_KEPT = 256
"""Tokens of a sequence up to which the backward pass takes the probabilities that the forward pass kept. Of longer ones
it computes them again, for they would take more memory than all else that attention keeps."""


def pads_up_to(query: torch.Tensor, key: torch.Tensor) -> int:
    """Return the tokens of a sequence up to which `attend_in_blocks` is faster than torch's kernel: none on a GPU.

    Where each head has its own keys these are D tokens, since a block's products are too small to be fast.

    Args:
        query: `[1, K * G, T, D]`.
        key: `[1, K, T, D]`.
    """
    if query.device.type != "cpu":
        return 0
    return _LONGEST if query.shape[1] > key.shape[1] else query.shape[3]


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float
) -> torch.Tensor:
    """Attend within each sequence to the tokens up to one's own.

    Args:
        query: `[K * G, T, D]`.
        key: `[K, T, D]`.
        value: `[K, T, V]`, V units per head.
        lengths: tokens of each sequence, in their order, T in all.
        scale: of the scores.

    Returns:
        `[T, K * G, V]`.
    """
    group = len(query) // len(key)
    layout = _Layout.make(tuple(lengths), len(key), group, _BLOCK if group > 1 else max(lengths))
    return cast(torch.Tensor, _BlockAttention.apply(query, key, value, layout, scale))


@dataclass(frozen=True)
class _Layout:
    """Where the tokens go."""

    rows: torch.Tensor
    """`[M * L]` int64: at each place, which of the `[T, K]` rows; any at padding."""
    places: torch.Tensor
    """`[T * K]` int64, the place of each row."""
    padding: torch.Tensor
    """int64, the places without a token."""
    blocks: tuple[tuple[slice, slice, slice], ...]
    """Of each block, the first tokens first: its matrices, its queries among `L * G`, and the keys up to its end."""
    group: int
    """G."""

    @classmethod
    @lru_cache(maxsize=8)
    def make(cls, lengths: tuple[int, ...], key_heads: int, group: int, block: int) -> Self:
        """Lay out sequences of these lengths; all layers have the same layout."""
        sizes, heads = np.array(lengths), np.arange(key_heads)[:, None]
        order, steps = np.argsort(-sizes, kind="stable"), np.arange(max(lengths))
        inside = np.repeat(steps < sizes[order, None, None], key_heads, 1)  # [N, K, L]
        starts = (sizes.cumsum() - sizes)[order, None, None]
        rows = np.where(inside, (starts + steps) * key_heads + heads, 0)
        places = np.empty(inside.sum(), np.int64)
        places[rows[inside]] = np.flatnonzero(inside)
        blocks = []
        for start in range(0, len(steps), block):
            stop, matrices = min(start + block, len(steps)), int((sizes > start).sum()) * key_heads
            blocks.append((slice(matrices), slice(start * group, stop * group), slice(stop)))
        by_place, padding = torch.from_numpy(rows.ravel()), torch.from_numpy(np.flatnonzero(~inside))
        return cls(by_place, torch.from_numpy(places), padding, tuple(blocks), group)

    def pad(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lay out `[K * G, T, D]` as `[M, L * G, D]`, in float32 or better."""
        rows = tensor.transpose(0, 1).reshape(len(self.places), -1).index_select(0, self.rows)
        matrices, exact = self.blocks[0][0].stop, torch.promote_types(tensor.dtype, torch.float32)
        return rows.to(exact).view(matrices, -1, tensor.shape[2])

    def unpad(self, padded: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return `[K * G, T, D]` for `[M, L * G, D]`, of the type of a tensor `[K * G, T, ...]`."""
        rows = padded.view(len(self.rows), -1).index_select(0, self.places).to(like.dtype)
        return rows.view(like.shape[1], -1, padded.shape[2]).transpose(0, 1)


class _BlockAttention(torch.autograd.Function):
    """Causal attention, block by block; the formulas are in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: _Layout, scale: float
    ) -> torch.Tensor:
        q, k, v = (layout.pad(tensor) for tensor in (query, key, value))
        attended, kept = q.new_empty(*q.shape[:2], v.shape[2]), []
        for matrices, queries, keys in layout.blocks:
            probs = _weigh(q[matrices, queries], k[matrices, keys], layout.group, scale)
            part = probs @ v[matrices, keys]
            if len(layout.blocks) > 1:
                attended[matrices, queries] = part
            else:
                attended = part  # no copy
            kept += [probs] if k.shape[1] <= _KEPT else []
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return layout.unpad(attended, query).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout, scale = ctx.layout, ctx.scale
        query, key, value, *kept = ctx.saved_tensors
        q, k, v, grad_out = (layout.pad(tensor) for tensor in (query, key, value, grad.transpose(0, 1)))
        grad_out.view(len(layout.rows), -1).index_fill_(0, layout.padding, 0)
        several = len(layout.blocks) > 1
        grads = [torch.zeros_like(whole) for whole in (q, k, v)] if several else []
        for block, (matrices, queries, keys) in enumerate(layout.blocks):
            of_block = q[matrices, queries], k[matrices, keys], v[matrices, keys], grad_out[matrices, queries]
            probs = kept[block] if kept else _weigh(*of_block[:2], layout.group, scale)
            parts = _differentiate(*of_block, probs, scale)
            if several:
                for whole, rows, part in zip(grads, (queries, keys, keys), parts, strict=True):
                    whole[matrices, rows] += part
            else:
                grads = parts
        return *(layout.unpad(whole, query) for whole in grads), None, None


def _weigh(query: torch.Tensor, key: torch.Tensor, group: int, scale: float) -> torch.Tensor:
    """Return the probabilities, `[M, B * G, E]`, of queries `[M, B * G, D]` of the last B tokens of E keys."""
    stop = key.shape[1]
    start = stop - query.shape[1] // group
    later = query.new_full((stop - start, stop), -torch.inf).triu_(start + 1).repeat_interleave(group, 0)
    return torch.baddbmm(later, query, key.transpose(1, 2), alpha=scale).softmax(2)


def _differentiate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    probs: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """Return a block's gradients of its queries, keys and values."""
    grad_scores = grad_out @ value.transpose(1, 2)
    grad_scores -= torch.linalg.vecdot(probs, grad_scores)[..., None]
    grad_scores *= probs
    grad_scores *= scale
    return [grad_scores @ key, grad_scores.transpose(1, 2) @ query, probs.transpose(1, 2) @ grad_out]
