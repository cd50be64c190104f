"""Prompts, responses and scores at random, as an engine is asked for them and a learner is given them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ppo_ray import trajectory
from ppo_ray.rollout.engine import Completion, GenerationRequest

Range = tuple[int, int]
"""Smallest and largest, both included."""


def random_requests(
    number: int, prompts: Range, responses: Range, vocab_size: int, seed: int = 0
) -> list[GenerationRequest]:
    """Draw prompts and the lengths of their responses."""
    rng = np.random.default_rng(seed)
    return [
        GenerationRequest(
            tuple(rng.integers(0, vocab_size, rng.integers(*prompts, endpoint=True)).tolist()),
            int(rng.integers(*responses, endpoint=True)),
            seed=int(rng.integers(1 << 31)),
        )
        for _ in range(number)
    ]


def lengths_of(requests: Sequence[GenerationRequest]) -> list[tuple[int, int]]:
    """Return the tokens of each prompt and of its response, which nothing ends before its limit."""
    return [(len(request.prompt_ids), request.max_tokens) for request in requests]


def random_completions(requests: Sequence[GenerationRequest], vocab_size: int, seed: int = 0) -> list[Completion]:
    """Draw a response of full length to each request."""
    rng = np.random.default_rng(seed)
    return [
        Completion(
            tuple(rng.integers(0, vocab_size, request.max_tokens).tolist()), (-1.0,) * request.max_tokens, "length"
        )
        for request in requests
    ]


def make_table(
    requests: Sequence[GenerationRequest], completions: Sequence[Completion], policy_version: int = 0
) -> pa.Table:
    """Make trajectories of requests and their completions, with scores drawn at random."""
    rows = [
        {
            "sample_id": index,
            "step": policy_version,
            "policy_version": policy_version,
            "worker": "rollout-0",
            "seed": request.seed,
            "prompt": "a prompt",
            "response": "a response",
            "prompt_ids": request.prompt_ids,
            "response_ids": completion.response_ids,
            "rollout_logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
    ]
    scores = np.random.default_rng(policy_version).normal(size=len(rows))
    return trajectory.with_scores(trajectory.from_rows(rows), scores.tolist())


def score_by_length(prompts: list[str], responses: list[str]) -> list[float]:
    """Score responses by their letters: a `reward.function` that costs nothing and loads nothing."""
    return [len(response) / 100 for response in responses]
