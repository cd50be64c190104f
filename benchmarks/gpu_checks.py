"""Checks of this GPU by torch alone, and what a check is given and tells; `gpu_acceptance` makes them and others."""

import importlib.util
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers

from benchmarks.card import free_bytes, name_of
from benchmarks.random_batches import make_table, random_completions, random_requests
from benchmarks.random_models import write_model
from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig, Quantization, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.models.loading import load_causal_lm
from ppo_ray.models.packing import pack
from ppo_ray.models.quantization import QuantizedMap, named_tensors
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.token_logprobs import token_logprobs
from ppo_ray.weights.checksums import format_sums, word_sums
from ppo_ray.weights.nccl_sender import LentBuffer

FLOAT32 = 1e-4
BFLOAT16 = 0.02
"""Largest differences between two ways to one result, in either dtype: nats per token, or of weights."""


@dataclass(frozen=True)
class Figure:
    """One figure of a check."""

    name: str
    value: float | str
    limit: float | None = None
    """The largest value that passes; None: any does."""

    @property
    def passed(self) -> bool:
        """Whether it is within its limit; what is no number is not."""
        return self.limit is None or (isinstance(self.value, int | float) and self.value <= self.limit)


class Skipped(Exception):
    """Raised by a check that cannot run here; its text says why."""


@dataclass(frozen=True)
class Bench:
    """What the checks are given."""

    device: torch.device
    folder: Path
    """Empty, for models and runs."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def write_model(self, shape: str) -> Path:
        """Write a random model once, and return its folder."""
        path = self.folder / shape
        if not path.exists():
            write_model(shape, path)
        return path


def require_two(bench: Bench) -> None:
    """Skip a check of two GPUs where there is one; a CPU stands for two, as far as the check can run there."""
    if bench.on_gpu and torch.cuda.device_count() < 2:
        raise Skipped("it needs two GPUs, and there is one")


Check = Callable[[Bench], Iterator[Figure]]


def check_machine(bench: Bench) -> Iterator[Figure]:
    """Name the card and the versions."""
    yield Figure("device", name_of(bench.device))
    yield Figure("free memory, GiB", round(free_bytes(bench.device) / 2**30, 1))
    yield Figure("python, torch, CUDA", f"{platform.python_version()}, {torch.__version__}, {torch.version.cuda}")
    yield Figure("transformers", transformers.__version__)
    if bench.on_gpu:
        yield Figure("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _learn(
    path: Path, device: str, dtype: str, model: dict[str, Any] | None = None, **learner: Any
) -> dict[str, torch.Tensor]:
    """Make one update on random trajectories and return the policy's weights, in float64 on the host."""
    options = UpdateConfig(learning_rate=1e-4, epochs=2, max_grad_norm=1.0)
    given = {"microbatch_tokens": 256} | learner
    named = ModelConfig.model_construct(path=str(path), dtype=dtype, **(model or {}))
    made = PPOLearner.load(named, options, LearnerConfig(**given), temperature=0.7, device=device)
    requests = random_requests(16, (2, 8), (4, 16), 512)
    made.update(make_table(requests, random_completions(requests, 512)), 0)
    return {name: tensor.detach().cpu().double() for name, tensor in made.named_weights()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_update(bench: Bench) -> Iterator[Figure]:
    """Compare one update on the GPU with the CPU's, and with itself by other ways to the same result."""
    path, device = bench.write_model("tiny"), bench.device.type
    here = _learn(path, device, "float32")
    yield Figure("update against the CPU's, weights", distance(here, _learn(path, "cpu", "float32")), FLOAT32)
    small = _learn(path, device, "float32", microbatch_tokens=64)
    yield Figure("update in smaller passes, weights", distance(here, small), FLOAT32)
    checkpointed = _learn(path, device, "float32", gradient_checkpointing=True)
    yield Figure("update with gradient checkpointing, weights", distance(here, checkpointed), FLOAT32)
    rounded = _learn(path, device, "bfloat16")
    yield Figure("update in bfloat16, weights", distance(here, rounded), BFLOAT16)
    away = _learn(path, device, "bfloat16", offload=("optimizer", "reference"))
    yield Figure("update with optimizer and reference put away, weights", distance(rounded, away), BFLOAT16)


def check_attention(bench: Bench) -> Iterator[Figure]:
    """Compare sequences end to end in a row, told by their bounds, with the same row under a mask."""
    draw = np.random.default_rng(0)
    prompts, responses = ([draw.integers(1, 512, 1 + 7 * size % 30) for size in range(20)] for _ in range(2))
    rows = pack([list(range(20))], prompts, responses, bench.device)
    for dtype, limit in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        loaded = load_causal_lm(str(bench.write_model("tiny")), dtype=dtype, device=bench.device)
        model = ResponseLM(loaded, temperature=1.0)
        assert model.traits.takes_bounds
        parameters = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
        found = model(rows).logprobs
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(found.sum(), parameters)])
        model.decoder.traits = replace(model.decoder.traits, takes_bounds=False)
        wanted = model(rows).logprobs
        right = torch.cat([each.flatten() for each in torch.autograd.grad(wanted.sum(), parameters)])
        yield Figure(f"{dtype} attention by bounds against a mask, nats", float((found - wanted).abs().mean()), limit)
        beyond = float((gradient - right).norm() / right.norm())
        yield Figure(f"{dtype} its gradient, relative", beyond, limit)


def check_codes(bench: Bench) -> Iterator[Figure]:
    """Compare the codes of quantised weights with the CPU's, and an update beside them in two ways to one result."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    path, device = bench.write_model("tiny"), bench.device.type
    for kind in get_args(Quantization):
        here, there = (load_causal_lm(str(path), device=place, quantization=kind) for place in (device, "cpu"))
        kept = zip(named_tensors(here), named_tensors(there), strict=True)
        differing = [int((one.cpu() != other).sum()) for (name, one), (_, other) in kept if name.endswith(".codes")]
        yield Figure(f"{kind} codes that are not the CPU's", sum(differing), 10)  # of weights midway between two
        states = torch.randn(64, here.config.hidden_size, device=device)
        layer = next(module for module in here.modules() if isinstance(module, QuantizedMap))
        exact = torch.nn.functional.linear(states, layer.dequantize(), layer.bias)
        alone = torch.cat([layer(states[row : row + 1]) for row in range(len(states))])
        yield Figure(f"{kind} products token by token, largest difference", float((alone - exact).abs().max()), 1e-3)
        beside = {"lora": LoraConfig(rank=4), "quantization": kind}
        one, other = (_learn(path, device, "float32", beside, microbatch_tokens=tokens) for tokens in (256, 64))
        yield Figure(f"update beside {kind} codes in smaller passes, weights", distance(one, other), FLOAT32)
        rounded = _learn(path, device, "bfloat16", beside)
        yield Figure(f"update beside {kind} codes in bfloat16, weights", distance(one, rounded), BFLOAT16)


def check_logits(bench: Bench) -> Iterator[Figure]:
    """Compare log-probabilities of bfloat16 states with float64's: on a GPU no logit may be rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 256, generator=generator).bfloat16() for size in (200, 4096))
    tokens = torch.arange(200)
    exact = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    found, _ = token_logprobs(
        *(tensor.to(bench.device) for tensor in (hidden, weight)), None, tokens.to(bench.device), 1.0
    )
    difference = float((found.cpu().double() - exact).abs().mean())
    yield Figure("log-probabilities of bfloat16 states, nats", difference, 1e-3 if bench.on_gpu else None)


def check_sums(bench: Bench) -> Iterator[Figure]:
    """Compare checksums made on the GPU with the CPU's."""
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8):
        tensor = torch.randn(5_000_001).mul(100).to(dtype)
        wrong += format_sums([word_sums(tensor)]) != format_sums([word_sums(tensor.to(bench.device))])
    yield Figure("dtypes with other checksums", wrong, 0)
    large = torch.zeros((1 << 30 if bench.on_gpu else 1 << 24) // 2, dtype=torch.bfloat16, device=bench.device)
    start = time.perf_counter()
    format_sums([word_sums(large)])
    yield Figure("checksums, GB per second", round(large.nbytes / (time.perf_counter() - start) / 1e9, 1))


_READER = """
import pickle, sys, torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
for line in sys.stdin.buffer:
    arguments = list(pickle.loads(bytes.fromhex(line.decode())))
    arguments[6] = torch.cuda.current_device()
    print(int(rebuild_cuda_tensor(*arguments).clone().long().sum()), flush=True)
    torch.cuda.synchronize()
"""


def check_lending(bench: Bench) -> Iterator[Figure]:
    """Lend memory to another process by CUDA IPC, two hundred times; nothing may leak."""
    if not bench.on_gpu:
        raise Skipped("CUDA IPC needs a GPU")
    reader = subprocess.Popen([sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin and reader.stdout
    wrong, before = 0, 0
    try:
        for turn in range(200):
            buffer = LentBuffer(1 << 20)
            buffer._buffer.fill_(turn % 251)
            torch.cuda.synchronize()
            (handle,) = buffer.handle.values()
            reader.stdin.write(pickle.dumps(handle).hex().encode() + b"\n")
            reader.stdin.flush()
            wrong += int(reader.stdout.readline()) != (turn % 251) << 20
            del buffer
            torch.cuda.ipc_collect()
            before = before or torch.cuda.memory_allocated()
    finally:
        reader.kill()
        reader.wait()
    yield Figure("turns that read other bytes", wrong, 0)
    yield Figure("memory that was not given back, MiB", (torch.cuda.memory_allocated() - before) / 2**20, 16)
