"""Sequences laid out in rows for a forward pass, and where in the rows the responses are predicted.

Dimensions: S rows, W tokens a row, B sequences, R response tokens (the longest here), N response tokens in all.
Positions and masks come from lengths, never from token ids. A response's last token is not among the inputs: nothing is
predicted from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppo_ray.algo.batching import Row


@dataclass(frozen=True)
class PackedRows:
    """One forward pass's worth of sequences."""

    sequences: np.ndarray
    """`[B]` int64, the caller's indices of the sequences, ascending; the rows of every `[B, R]` below."""
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

    def attention_mask(self, packed: bool) -> torch.Tensor:
        """Return `[S, 1, W, W]` bool, causal within each sequence; or `[S, W]` int64 for one sequence a row."""
        if not packed:
            return (self.segment_ids >= 0).long()
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        return same.tril()[:, None]


def empty_rows(device: torch.device | str = "cpu") -> PackedRows:
    """Return a pass over no sequence: one token, from which nothing is predicted. Its loss and gradients are zero."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    nothing = token.new_empty(0)
    return PackedRows(np.empty(0, np.int64), token, token, token, nothing, nothing, nothing.bool().reshape(0, 1))


def pack(
    rows: Sequence[Row],
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
) -> PackedRows:
    """Lay out the named sequences, prompt and response but for its last token, row by row.

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
    return PackedRows(sequences, **{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
