"""How the losses of tokens become the loss of a mini-batch: what each token weighs.

Every aggregation is a weighted sum with weights that are known before the forward pass, the same for all tokens of a
sequence. So a mini-batch may be split into micro-batches, and over ranks, in any way: the shares add up.
"""

from collections.abc import Sequence
from typing import Literal

import torch

Aggregation = Literal["token_mean", "sequence_mean", "microbatch_mean"]


def token_weights(num_tokens: Sequence[int], aggregation: Aggregation, num_parts: int = 1) -> torch.Tensor:
    """Return what each token of each sequence of a mini-batch weighs; over all tokens the weights add up to one.

    - token_mean: 1 / N, N the tokens of the mini-batch. All tokens count alike.
    - sequence_mean: 1 / (B * R_i). All sequences count alike, whatever their length.
    - microbatch_mean: 1 / (P * N_p), N_p the tokens of the part that the sequence is in. All parts count alike, so that
      a token counts less among longer neighbours: TRL 0.11's mean of means under gradient accumulation.

    Args:
        num_tokens: `[B]`, response tokens of each sequence, at least 1, in the mini-batch's order.
        aggregation: which.
        num_parts: P, equal runs of consecutive sequences; only microbatch_mean looks at it.

    Returns:
        `[B]` float64.

    Raises:
        ValueError: there is no sequence, one without a token, or fewer sequences than parts.
    """
    tokens = torch.as_tensor(num_tokens, dtype=torch.float64)
    if not 1 <= num_parts <= len(tokens) or (tokens < 1).any():
        raise ValueError(f"{len(tokens)} sequences of {list(num_tokens)} tokens cannot be weighed in {num_parts} parts")
    match aggregation:
        case "token_mean":
            return torch.full_like(tokens, 1 / float(tokens.sum()))
        case "sequence_mean":
            return 1 / (len(tokens) * tokens)
        case "microbatch_mean":
            parts = tokens.tensor_split(num_parts)
            return torch.cat([torch.full_like(part, 1 / (num_parts * float(part.sum()))) for part in parts])
    raise ValueError(f"aggregation={aggregation!r}; it must be token_mean, sequence_mean or microbatch_mean")
