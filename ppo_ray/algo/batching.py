"""Which process takes which sequences, which of them go through the model together, and in which rows."""

import bisect
import heapq
from collections.abc import Sequence

Row = list[int]
"""Indices of the sequences that lie one after another in a row."""


def balanced(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal sequences out so that every share has nearly the same number of tokens.

    The longest first, each to the share that has the fewest tokens yet (Graham, "Bounds on multiprocessing timing
    anomalies", 1969: the largest share is at most 4/3 of the smallest possible). Ties are broken by index.

    Args:
        lengths: tokens of each sequence.
        num_shares: at least 1; there may be more of them than sequences.

    Returns:
        Indices into `lengths` in ascending order, a list for each share; each index occurs once.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, share) for share in range(num_shares)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, share = heapq.heappop(loads)
        shares[share].append(index)
        heapq.heappush(loads, (load + lengths[index], share))
    return [sorted(share) for share in shares]


def microbatches(lengths: Sequence[int], budget: int, row_width: int = 0) -> list[list[Row]]:
    """Lay sequences out in rows and the rows in micro-batches, longest first, with little padding.

    The layout depends on the lengths alone, ties broken by index: the same sequences always meet the same neighbours.

    Args:
        lengths: tokens of each sequence, at least 1.
        budget: tokens, padding included, of a micro-batch: rows times the longest row. A row that exceeds it alone is
            a micro-batch of its own.
        row_width: rows are filled up to this many tokens (or to the longest sequence if that is more), or up to a
            quarter more if that makes fewer micro-batches or less padding; 0 means one sequence a row.

    Returns:
        Micro-batches of rows of indices into `lengths`; each index occurs once.

    Raises:
        ValueError: a length or the budget is below 1.
    """
    if budget < 1 or any(length < 1 for length in lengths):
        raise ValueError(f"budget {budget} and shortest length {min(lengths, default=1)}; both must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if not row_width:
        return _filled([[index] for index in order], lengths, budget)
    narrowest = max([row_width, *lengths])
    widest = max(narrowest, min(budget, narrowest + narrowest // 4))
    widths = range(narrowest, widest + 1, max(1, narrowest // 64))
    layouts = (_filled(packed_rows(order, lengths, width), lengths, budget) for width in widths)
    return min(layouts, key=lambda batches: (len(batches), _num_tokens(batches, lengths)))  # the narrowest of equals


def packed_rows(order: Sequence[int], lengths: Sequence[int], width: int) -> list[Row]:
    """Put each sequence, in the given order, into the fullest row with room for it (best fit); a row holds `width`."""
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


def _filled(rows: list[Row], lengths: Sequence[int], budget: int) -> list[list[Row]]:
    """Fill micro-batches with rows, the longest first."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: _width(row, lengths), reverse=True):  # stable
        if not batches or (len(batches[-1]) + 1) * _width(batches[-1][0], lengths) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _num_tokens(batches: list[list[Row]], lengths: Sequence[int]) -> int:
    """Return how many tokens are computed, padding included."""
    return sum(len(batch) * _width(batch[0], lengths) for batch in batches)


def _width(row: Row, lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)
