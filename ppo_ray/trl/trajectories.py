"""What a script gives to `step`, checked, as the table that our learner takes."""

from typing import Any

import pyarrow as pa
import torch

from ppo_ray import trajectory


def scored_trajectories(
    queries: list[torch.Tensor],
    responses: list[torch.Tensor],
    scores: list[torch.Tensor],
    response_masks: list[torch.Tensor] | None,
    batch_size: int,
    eos_token_id: int | None,
) -> pa.Table:
    """Build a table of `trajectory.SCHEMA`; what the engine thought of the tokens is unknown and NaN.

    Args:
        queries: `[P]` token ids each.
        responses: `[R]` token ids each.
        scores: one number each.
        response_masks: None, or all ones.
        batch_size: how many of each there must be.
        eos_token_id: a response that ends with it ended by itself.

    Raises:
        ValueError: something is not as said; the message names the sample.
    """
    for name, tensors in (("queries", queries), ("responses", responses), ("scores", scores)):
        if not isinstance(tensors, list) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise ValueError(f"{name} must be a list of tensors")
        if len(tensors) != batch_size:
            raise ValueError(f"{name} has {len(tensors)} tensors, but batch_size={batch_size}")
    numbers = []
    for index, score in enumerate(scores):
        if score.dim() > 1 or score.numel() != 1:
            raise ValueError(f"scores[{index}] has shape {tuple(score.shape)}; it must be one number")
        if not torch.isfinite(score).all():
            raise ValueError(f"scores[{index}] is {float(score)}; a score must be finite")
        numbers.append(float(score))
    if response_masks is not None and not all(bool(mask.all()) for mask in response_masks):
        raise ValueError("response_masks cannot be honoured: every token of a response is learnt from; leave them out")
    rows = [
        _row(index, query, response, eos_token_id)
        for index, (query, response) in enumerate(zip(queries, responses, strict=True))
    ]
    return trajectory.with_scores(trajectory.from_rows(rows), numbers)


def _row(index: int, query: torch.Tensor, response: torch.Tensor, eos_token_id: int | None) -> dict[str, Any]:
    for name, ids in (("queries", query), ("responses", response)):
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError(f"{name}[{index}] is {ids.dtype} {tuple(ids.shape)}; it must be [tokens], at least one")
    response_ids = response.tolist()
    return {
        "sample_id": index,
        "step": 0,
        "policy_version": 0,
        "worker": "trl",
        "seed": 0,
        "prompt": "",
        "response": "",
        "prompt_ids": query.tolist(),
        "response_ids": response_ids,
        "rollout_logprobs": [float("nan")] * len(response_ids),
        "finish_reason": "stop" if response_ids[-1] == eos_token_id else "length",
    }
