"""What an engine computes against plain transformers, before and after new weights; vLLM in a process of its own."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from ppo_ray.rollout.engine import Completion, GenerationRequest, Sampling
from ppo_ray.weights.snapshot import WeightSnapshot, Wire

REQUESTS = [
    GenerationRequest(
        tuple((7 * i + 13 * k) % 500 + 5 for k in range(2 + i % 7)), max_tokens=4 + i % 13, seed=10**18 + i
    )
    for i in range(24)
]


class Generates(Protocol):
    """As much of an engine as is compared."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]: ...

    def load_weights(self, snapshot: WeightSnapshot) -> None: ...


def reference(folder: Path, noise: float = 0.0) -> torch.nn.Module:
    """Return the model of a folder, each of its weights changed by a share of itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    return model


@torch.inference_mode()
def largest_difference(model: torch.nn.Module, completions: list[Completion], temperature: float = 1.0) -> float:
    """Return the largest difference to the log-probabilities that plain transformers gives, one sequence at a time."""
    worst = 0.0
    for request, completion in zip(REQUESTS, completions, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.response_ids]])
        logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return worst


def compare_engine(engine: Generates, folder: Path) -> tuple[float, float]:
    """Check an engine's log-probabilities with the weights of its folder, and with two others after that.

    Buckets are so small that they cut layers in two.

    Returns:
        The largest differences to plain transformers: of all, and of what should differ, the engine with one set of
        weights and transformers with the next.
    """
    completions = engine.generate(REQUESTS, Sampling())
    off, moved = [largest_difference(reference(folder), completions)], []
    for version in (1, 2):
        model = reference(folder, 0.2 * version)
        moved.append(largest_difference(model, completions))
        engine.load_weights(WeightSnapshot.take(model.named_parameters(), version, Wire(None, 20_000)))
        completions = engine.generate(REQUESTS, Sampling())
        off.append(largest_difference(model, completions))
    return max(off), min(moved)


class DistantVLLM:
    """vLLM engines, one after the other, in a process of their own.

    vLLM changes classes of transformers where it has no layers of its own, and does not serve a mixture of experts
    after a model without.
    """

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)

    def start(self, folder: Path, **options: Any) -> None:
        """Start an engine in the place of the one before."""
        self._call("start", folder, options)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        completions: list[Completion] = self._call("generate", requests, sampling)
        return completions

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        self._call("load_weights", snapshot)

    def close(self) -> None:
        self._call("close")
        self._pool.shutdown()

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._pool.submit(_answer, name, arguments).result(timeout=300)


_ENGINES: list[Any] = []


KEPT: list[Any] = []


def start_beside_others(folder: Path, **options: Any) -> Any:
    """Start a vLLM engine that lives as long as the process: its end would take from the others what all share.

    vLLM lets models of one shape share their rotary embeddings. Those of an engine that was sent damaged weights stay
    on the meta device until it gets whole ones, and so this engine makes its own.
    """
    from vllm.model_executor.layers import rotary_embedding

    from ppo_ray.rollout.vllm import VLLMEngine

    rotary_embedding._ROPE_DICT.clear()
    KEPT.append(VLLMEngine(str(folder), max_context=128, max_num_seqs=32, kv_cache_mib=32, **options))
    return KEPT[-1]


def _prepare() -> None:
    """Set what vLLM reads when it is imported, and let it look at a model's class here: it would start a process."""
    from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, ENVIRONMENT

    os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT)
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def _answer(name: str, arguments: Sequence[Any]) -> Any:
    from ppo_ray.rollout.vllm import VLLMEngine

    if name not in ("start", "close"):
        return getattr(_ENGINES[0], name)(*arguments)
    while _ENGINES:
        _ENGINES.pop().close()
    if name == "start":
        folder, options = arguments
        _ENGINES.append(VLLMEngine(str(folder), max_context=128, max_num_seqs=32, kv_cache_mib=16, **options))
