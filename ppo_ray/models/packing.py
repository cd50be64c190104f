"""Packing: sequences laid out in rows for a forward pass, and rows in micro-batches.

Positions and masks come from lengths, never from token ids. A response's last token is not among the inputs: nothing is
predicted from it.

Where prompts begin with the same tokens, as with one system message or with several responses to a prompt, a row can
hold these tokens once: a state depends on the tokens before it alone. Such a row is a tree of tokens, written depth
first. The loss is a sum over response tokens, so the gradients of all that follow add up in the shared tokens.

Dimensions: S rows, W tokens per row, B sequences, R response tokens of the longest, N of all.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch

from ppo_ray.models.attention import make_bounds

Row = list[int]
"""Indices of the sequences that lie one after another in a row."""
SHORTEST_SHARED = 16
"""Tokens from which on a common beginning of prompts is worth sharing."""


@dataclass(frozen=True)
class PackedRows:
    """The inputs of one forward pass."""

    sequences: np.ndarray
    """`[B]` int64, the caller's indices of the sequences, ascending; the rows of every `[B, R]` below."""
    packed: bool
    """Whether a row holds several sequences; known on the host, so that a forward pass need not ask the device."""
    longest: int
    """Tokens of the longest sequence among the inputs."""
    input_ids: torch.Tensor
    """`[S, W]` int64."""
    position_ids: torch.Tensor
    """`[S, W]` int64, from 0 at each sequence's start."""
    seen_until: torch.Tensor
    """`[S, W]` int64, the place in its row behind the last token that may attend to a token; 0 for padding."""
    predict_at: torch.Tensor
    """`[N]` int64, flat indices into `[S, W]`: the token before each response token, sequence after sequence."""
    target_ids: torch.Tensor
    """`[N]` int64, the response tokens."""
    response_mask: torch.Tensor
    """`[B, R]` bool; its True entries in order are the N."""
    places: torch.Tensor
    """`[N]` int64, flat indices into `[B, R]` of the mask's True entries: who has them need not ask the device."""
    bounds: torch.Tensor | None = None
    """See `make_bounds`, of sequences that lie end to end in one row; None: they lie in several rows, or in a tree."""

    def attention_mask(self, block_diagonal: bool) -> torch.Tensor:
        """Return a mask for any rows, or one that is for unpacked rows alone.

        Args:
            block_diagonal: True: `[S, 1, W, W]` bool, causal within each sequence, padding sees itself; False: `[S, W]`
                int64, 0 at padding.
        """
        if not block_diagonal:
            return (self.seen_until > 0).long()
        places = torch.arange(self.seen_until.shape[1], device=self.seen_until.device)
        until = torch.maximum(self.seen_until, places + 1)  # the softmax over nothing would be NaN
        return (places[:, None] < until[:, None, :]).tril()[:, None]

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Self:
        """Make a pass over no sequence: one token, from which nothing is predicted. Its loss and gradients are zero."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        nothing = token.new_empty(0)
        mask = nothing.bool().reshape(0, 1)
        return cls(np.empty(0, np.int64), False, 1, token, token, token + 1, nothing, nothing, mask, nothing)


def pack(
    rows: Sequence[Row],
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
    shortest_shared: int = 0,
) -> PackedRows:
    """Lay sequences out row by row, each as its prompt and its response without the last token.

    Args:
        rows: indices into `prompt_ids` and `response_ids`; each at most once.
        prompt_ids: `[P]` integers each, P at least 1.
        response_ids: `[R]` integers each, R at least 1.
        device: where the tensors go.
        shortest_shared: what a prompt has in common with the one before it in its row is not laid out again, if it has
            at least so many tokens; 0: each sequence is laid out whole.

    Raises:
        ValueError: a prompt or response has no token.
    """
    sequences = np.array(sorted(index for row in rows for index in row), np.int64)
    for index in sequences:
        if not len(prompt_ids[index]) or not len(response_ids[index]):
            raise ValueError(f"sequence {index} has no prompt or no response token")
    common = {index: 0 for index in sequences.tolist()}
    if shortest_shared:
        for row in rows:
            found = count_common([prompt_ids[index] for index in row])
            common |= zip(row, (number if number >= shortest_shared else 0 for number in found), strict=True)
    sizes = [sum(len(prompt_ids[i]) + len(response_ids[i]) - 1 - common[i] for i in row) for row in rows]
    input_ids, position_ids, seen_until = (np.zeros((len(rows), max(sizes)), np.int64) for _ in range(3))
    predict_at: dict[int, np.ndarray] = {}
    for number, row in enumerate(rows):
        stop = 0
        path = np.empty(0, np.int64)  # the places of a sequence's tokens
        for index in row:
            start, known = stop, common[index]
            ids = np.concatenate([prompt_ids[index], response_ids[index][:-1]])
            stop = start + len(ids) - known
            input_ids[number, start:stop] = ids[known:]
            position_ids[number, start:stop] = np.arange(known, len(ids))
            seen_until[number, path[known:]] = start
            path = np.concatenate([path[:known], np.arange(start, stop)])
            predict_at[index] = number * input_ids.shape[1] + path[len(prompt_ids[index]) - 1 :]
        seen_until[number, path] = stop
    response_lengths = np.array([len(response_ids[index]) for index in sequences])
    response_mask = np.arange(response_lengths.max())[None] < response_lengths[:, None]
    arrays = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "seen_until": seen_until,
        "predict_at": np.concatenate([predict_at[index] for index in sequences]),
        "target_ids": np.concatenate([response_ids[index] for index in sequences]).astype(np.int64),
        "response_mask": response_mask,
        "places": np.flatnonzero(response_mask),
    }
    tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    packed, longest = any(len(row) > 1 for row in rows), int(position_ids.max()) + 1
    bounds = None
    if len(rows) == 1 and not any(common.values()):
        bounds = make_bounds([len(prompt_ids[index]) + len(response_ids[index]) - 1 for index in rows[0]])
    return PackedRows(sequences, packed, longest, **tensors, bounds=bounds)


def count_common(prompt_ids: Sequence[np.ndarray]) -> list[int]:
    """Count the tokens that each prompt has in common with the one before it, from the beginning on."""
    counts = [0] if prompt_ids else []
    for before, prompt in pairwise(prompt_ids):
        size = min(len(before), len(prompt))
        differs = before[:size] != prompt[:size]
        counts.append(int(differs.argmax()) if differs.any() else size)
    return counts


def join_prompts(
    sequences: Sequence[int],
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    *,
    hidden_size: int,
    narrowest: int,
    widest: int,
) -> tuple[list[Row], list[int]]:
    """Put sequences together whose prompts begin alike, as long as the tokens saved outweigh the wider attention.

    Two rows of W / 2 tokens with p in common become one of W - p. That saves p tokens of a layer's products, about 24 p
    H^2 operations, and costs 2 H W^2 more in attention. So it pays up to W = sqrt(12 p H) where both run at the same
    rate. Attention under a mask is slower, so that W may be sqrt(4 p H).

    Args:
        sequences: indices into `prompt_ids` and `response_ids`.
        prompt_ids: `[P]` integers each.
        response_ids: `[R]` integers each.
        hidden_size: H.
        narrowest: tokens that a row may always have.
        widest: tokens that none may have, but where one sequence has more.

    Returns:
        Rows, each sequence in one of them, in the order of their lowest index; and the size of each: its tokens or its
        predictions, whichever are more.
    """
    order = sorted(sequences, key=lambda index: prompt_ids[index].astype(">i8").tobytes())  # token by token
    found: list[tuple[Row, int]] = []
    tokens = predictions = 0
    for index, common in zip(order, count_common([prompt_ids[index] for index in order]), strict=True):
        own, targets = len(prompt_ids[index]) + len(response_ids[index]) - 1, len(response_ids[index])
        size = max(tokens + own - common, predictions + targets)
        limit = min(max(narrowest, math.isqrt(4 * common * hidden_size)), widest)
        if common >= SHORTEST_SHARED and size <= limit:
            tokens, predictions = tokens + own - common, predictions + targets
            found[-1] = [*found[-1][0], index], size
        else:
            tokens, predictions = own, targets
            found.append(([index], own))
    found.sort(key=lambda item: min(item[0]))
    return [row for row, _ in found], [size for _, size in found]


def balance(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal sequences out to shares of nearly the same number of tokens, or anything else to shares of the same size.

    The longest is dealt first, each to the share with the fewest tokens so far (Graham 1969, "Bounds on multiprocessing
    timing anomalies": the largest share is at most 4/3 of the smallest possible). Ties are broken by index.

    Args:
        lengths: tokens of each sequence, or sizes.
        num_shares: at least 1; may exceed the number of sequences.

    Returns:
        For each share, indices into `lengths` in ascending order; each index occurs once.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, share) for share in range(num_shares)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, share = heapq.heappop(loads)
        shares[share].append(index)
        heapq.heappush(loads, (load + lengths[index], share))
    return [sorted(share) for share in shares]


def make_microbatches(lengths: Sequence[int], budget: int, row_width: int = 0) -> list[list[Row]]:
    """Lay sequences out in rows and the rows in micro-batches, longest first, with little padding.

    The layout depends on the lengths alone, and ties are broken by index: the same sequences always have the same
    neighbours.

    Args:
        lengths: tokens of each sequence, at least 1.
        budget: tokens of a micro-batch, padding included: rows times the longest row. A row that exceeds it alone is a
            micro-batch of its own.
        row_width: rows are filled up to this many tokens (or to the longest sequence if that is more), or up to a
            quarter more if that makes fewer micro-batches or less padding; 0: one sequence per row. The budget: each
            micro-batch is one row, without padding, in which the longest comes first.

    Returns:
        Micro-batches of rows of indices into `lengths`; each index occurs once.

    Raises:
        ValueError: a length or the budget is below 1.
    """
    if budget < 1 or any(length < 1 for length in lengths):
        raise ValueError(f"budget {budget} and shortest length {min(lengths, default=1)}; both must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if not row_width:
        return _fill_microbatches([[index] for index in order], lengths, budget)
    if row_width == budget:
        return [[row] for row in _fill_rows(order, lengths, budget)]
    narrowest = max([row_width, *lengths])
    widest = max(narrowest, min(budget, narrowest + narrowest // 4))
    widths = range(narrowest, widest + 1, max(1, narrowest // 64))
    layouts = (_fill_microbatches(_fill_rows(order, lengths, width), lengths, budget) for width in widths)
    return min(layouts, key=lambda batches: (len(batches), _count_tokens(batches, lengths)))  # the narrowest of equals


def _fill_rows(order: Sequence[int], lengths: Sequence[int], width: int) -> list[Row]:
    """Put each sequence, in the given order, into the fullest row with room for it (best fit); rows hold `width`."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, ascending
    for index in order:
        place = bisect.bisect_left(room, (lengths[index], 0))
        free, row = room.pop(place) if place < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (free - lengths[index], row))
    return rows


def _fill_microbatches(rows: list[Row], lengths: Sequence[int], budget: int) -> list[list[Row]]:
    """Fill micro-batches with rows, the longest first."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: _width(row, lengths), reverse=True):  # stable
        if not batches or (len(batches[-1]) + 1) * _width(batches[-1][0], lengths) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _count_tokens(batches: list[list[Row]], lengths: Sequence[int]) -> int:
    """Count the tokens of all micro-batches, padding included."""
    return sum(len(batch) * _width(batch[0], lengths) for batch in batches)


def _width(row: Row, lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)
