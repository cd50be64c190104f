"""The interface of all engines: token ids in, token ids and their log-probabilities out; weights replaced on demand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ppo_ray.errors import WorkerError
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import WeightSnapshot

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """The sampling of all requests of a call: from the full softmax at a temperature, nothing cut off."""

    temperature: float = 1.0
    """At least 0. 0 is greedy; log-probabilities are then those of temperature 1."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of them ends a response and is its last token."""


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one response."""

    prompt_ids: tuple[int, ...]
    """`[P]` token ids of the policy's vocabulary, at least one."""
    max_tokens: int
    """The response's own limit, tokens, at least 1."""
    seed: int
    """Seed of this response alone, in `[0, 2**63)`. In float32 on CPUs the same request gives the same response in any
    batch; on GPUs the last bits of logits depend on it, unless `rollout.batch_invariant` chooses other kernels."""
    name: str = ""
    """The name that errors call it by, e.g. `"sample 12"`; empty: its place in the call."""


@dataclass(frozen=True)
class Completion:
    """The response to one request."""

    response_ids: tuple[int, ...]
    """`[R]` token ids, the stop token included."""
    logprobs: tuple[float, ...]
    """`[R]` log-probabilities of the sampled tokens, at the sampling temperature, nats."""
    finish_reason: FinishReason
    """`"stop"`: a stop token came; `"length"`: the limit did."""


class Engine(Protocol):
    """A policy that generates responses.

    Engines know no Ray. They are not thread-safe: one call at a time.
    """

    policy_version: int
    """Policy version of the weights in use; -1 until the first `load_weights`, for those of the model's folder."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        """Sample one response per request, in the order of the requests.

        Raises:
            WorkerError: a request cannot be served; see `check_requests`.
        """
        ...

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Verify the snapshot, serve it from now on, and forget everything computed with earlier weights.

        Buckets are loaded one after the other, each verified before any of its tensors is used. An update that breaks
        off leaves weights of two policies behind; `policy_version` is -1 then.

        Raises:
            WorkerError: the snapshot is damaged or does not fit the model.
        """
        ...

    def sleep(self, keep_weights: bool = True) -> None:
        """Leave the GPU to others; the next `generate` or `load_weights` wakes the engine.

        On a CPU it changes nothing.

        Args:
            keep_weights: whether the next `generate` is for the same weights. Else an engine may drop them; it is lost
                if it is asked before others have come.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


class Receiver(Engine, Protocol):
    """An engine whose weights come from another GPU, or from its own, without passing the host."""

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join the sender's group, for `receive_weights`."""
        ...

    def receive_weights(self, manifest: WeightManifest) -> None:
        """Receive the tensors that the manifest lists from the group; otherwise as `load_weights`."""
        ...

    def map_weights(self, manifest: WeightManifest, bucket: int, handles: dict[str, Any]) -> None:
        """Read one of the manifest's buckets from memory that is lent to this GPU; otherwise as `load_weights`."""
        ...


def check_requests(requests: Sequence[GenerationRequest], vocab_size: int, max_context: int) -> None:
    """Refuse requests that no engine could serve, before any of them is started.

    Raises:
        WorkerError: a token id is outside the vocabulary, or prompt and response do not fit into `max_context`.
    """
    for index, request in enumerate(requests):
        if not all(0 <= token < vocab_size for token in request.prompt_ids):
            raise WorkerError(
                f"{_name(request, index)}: its prompt has token ids {list(request.prompt_ids)[:20]} but the model "
                f"knows 0 to {vocab_size - 1}; is this the model's own tokenizer?"
            )
        if len(request.prompt_ids) + request.max_tokens > max_context:
            raise WorkerError(
                f"{_name(request, index)}: a prompt of {len(request.prompt_ids)} tokens and its response of up to "
                f"{request.max_tokens} exceed rollout.max_context={max_context}"
            )


def check_finite(request: GenerationRequest, index: int, logprobs: Sequence[float]) -> None:
    """Refuse a response whose log-probabilities are not numbers: its tokens were drawn from no distribution.

    Args:
        request: it answers.
        index: of the request in its call.
        logprobs: of the response's tokens so far, nats.

    Raises:
        WorkerError: one is NaN or infinite; names the sample.
    """
    for place, logprob in enumerate(logprobs):
        if not math.isfinite(logprob):
            raise WorkerError(
                f"{_name(request, index)}: the log-probability of its response's token {place + 1} is {logprob}, after "
                f"a prompt of {len(request.prompt_ids)} tokens: the policy computes no finite logits. Its weights may "
                "have diverged (lower ppo.learning_rate), or not fit the dtype (rollout.dtype=float32)"
            )


def _name(request: GenerationRequest, index: int) -> str:
    return request.name or f"request {index}"
