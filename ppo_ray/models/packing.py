"""Packing: sequences laid out in rows for a forward pass, and rows in micro-batches.

Positions and masks come from lengths, never from token ids. A response's last token is not among the inputs: nothing is
predicted from it.

Dimensions: S rows, W tokens per row, B sequences, R response tokens of the longest, N of all.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

Row = list[int]
"""Indices of the sequences that lie one after another in a row."""


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
    segment_ids: torch.Tensor
    """`[S, W]` int64, which sequence of its row a token belongs to, -1 for padding."""
    predict_at: torch.Tensor
    """`[N]` int64, flat indices into `[S, W]`: the token before each response token, sequence after sequence."""
    target_ids: torch.Tensor
    """`[N]` int64, the response tokens."""
    response_mask: torch.Tensor
    """`[B, R]` bool; its True entries in order are the N."""

    def attention_mask(self, block_diagonal: bool) -> torch.Tensor:
        """Return a mask for any rows, or one that is for unpacked rows alone.

        Args:
            block_diagonal: True: `[S, 1, W, W]` bool, causal within each sequence; False: `[S, W]` int64, 0 at padding.
        """
        if not block_diagonal:
            return (self.segment_ids >= 0).long()
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        return same.tril()[:, None]

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Self:
        """Make a pass over no sequence: one token, from which nothing is predicted. Its loss and gradients are zero."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        nothing = token.new_empty(0)
        mask = nothing.bool().reshape(0, 1)
        return cls(np.empty(0, np.int64), False, 1, token, token, token, nothing, nothing, mask)


def pack(
    rows: Sequence[Row],
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
) -> PackedRows:
    """Lay sequences out row by row, each as its prompt and its response without the last token.

    Args:
        rows: indices into `prompt_ids` and `response_ids`; each at most once.
        prompt_ids: `[P]` integers each, P at least 1.
        response_ids: `[R]` integers each, R at least 1.
        device: where the tensors go.

    Raises:
        ValueError: a prompt or response has no token.
    """
    sequences = np.array(sorted(index for row in rows for index in row), np.int64)
    for index in sequences:
        if not len(prompt_ids[index]) or not len(response_ids[index]):
            raise ValueError(f"sequence {index} has no prompt or no response token")
    width = max(sum(len(prompt_ids[index]) + len(response_ids[index]) - 1 for index in row) for row in rows)
    input_ids, position_ids = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    segment_ids = np.full((len(rows), width), -1, np.int64)
    predict_at: dict[int, np.ndarray] = {}
    for number, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row):
            first_response = start + len(prompt_ids[index])
            stop = first_response + len(response_ids[index]) - 1
            input_ids[number, start:first_response] = prompt_ids[index]
            input_ids[number, first_response:stop] = response_ids[index][:-1]
            position_ids[number, start:stop] = np.arange(stop - start)
            segment_ids[number, start:stop] = segment
            predict_at[index] = number * width + np.arange(first_response - 1, stop)
            start = stop
    response_lengths = np.array([len(response_ids[index]) for index in sequences])
    arrays = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "predict_at": np.concatenate([predict_at[index] for index in sequences]),
        "target_ids": np.concatenate([response_ids[index] for index in sequences]).astype(np.int64),
        "response_mask": np.arange(response_lengths.max())[None] < response_lengths[:, None],
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    packed, longest = any(len(row) > 1 for row in rows), int(position_ids.max()) + 1
    return PackedRows(sequences, packed, longest, **tensors)


def balance(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal sequences out to shares of nearly the same number of tokens.

    The longest is dealt first, each to the share with the fewest tokens so far (Graham 1969, "Bounds on multiprocessing
    timing anomalies": the largest share is at most 4/3 of the smallest possible). Ties are broken by index.

    Args:
        lengths: tokens of each sequence.
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
            quarter more if that makes fewer micro-batches or less padding; 0: one sequence per row.

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
