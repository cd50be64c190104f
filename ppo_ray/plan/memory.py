"""Estimates of the memory that the processes of a run hold: a few terms for each actor, from the sizes of the models.

`docs/gpus.md` compares them with measurements.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ppo_ray.config import Config
from ppo_ray.config.transport import weight_transport
from ppo_ray.plan.adapters import sends_adapters
from ppo_ray.plan.sizes import ModelSizes

BYTES = {"float32": 4, "bfloat16": 2}
EXACT = 4
"""Bytes of a parameter that the optimizer steps: float32, whatever `model.dtype` computes in."""
MIB = 1 << 20

Device = Literal["gpu", "host"]
When = Literal["always", "at work"]


@dataclass(frozen=True)
class Term:
    """One use of memory."""

    what: str
    how: str
    """The arithmetic, in words and figures."""
    num_bytes: int
    device: Device
    when: When = "always"
    """`at work`: only while it is the actor's turn; an actor that shares its GPU then gives this memory back."""


_PROCESS_MIB = {"rollout": 600, "hf": 350, "reward": 360, "learner": 350}
"""Python with its libraries, without a model worth mention, and without the pages of files, which all share: measured,
see `docs/gpus.md`."""
_NODE_MIB = 1050
_CUDA_MIB = {"rollout": 4000, "reward": 800, "learner": 1000}
"""CUDA's context and kernels, an engine's graphs and the pass that it measures itself by: assumed, not measured."""


def reward_terms(config: Config, sizes: ModelSizes) -> Iterator[Term]:
    """Yield what a reward worker holds; what a user's own function holds is not known."""
    device: Device = "gpu" if config.reward.gpus else "host"
    yield process_term("reward", "reward")
    sources = [source for _, source in config.reward.sources if source.path]
    judges = [source.judge for _, source in config.reward.sources if source.judge]
    if (sources or judges) and device == "gpu":
        yield cuda_term("reward")
    for source, size in zip(sources, sizes.classifiers, strict=True):
        item = 2 if source.dtype == "bfloat16" else 4
        yield parameter_term("classifier", size.parameters, item, device)
        texts = min(source.batch_size, config.rollout.batch_size)
        tokens = texts * (config.prompts.max_tokens + config.rollout.max_response_tokens)
        width = 4 * size.hidden + 2 * size.intermediate
        how = f"{tokens} tokens x (4 x {size.hidden} + 2 x {size.intermediate}) x {item} bytes"
        yield Term("a layer's activations", how, tokens * width * item, device)
    for judge, size in zip(judges, sizes.judges, strict=True):
        item = 2 if judge.dtype == "bfloat16" else 4
        yield parameter_term("judge", size.parameters, item, device)
        if judge.engine == "vllm":
            kv = judge.kv_cache_mib
            yield Term("the judge's KV cache", f"judge.kv_cache_mib={kv}", kv * MIB, device, "at work")


def store_terms(config: Config, sizes: ModelSizes) -> Iterator[Term]:
    """Yield what lies in the object store of a node with a learner or a rollout worker."""
    if weight_transport(config) == "object_store":
        number, size = count_traffic(config, sizes)
        copies = 1 if config.ray.is_private else 2  # another Ray may take a second to free what was dropped
        whose = "" if config.ray.is_private else ": the engines' and the next"
        how = f"{copies} x {format_count(number)} x {size} bytes{whose}"
        yield Term("weights on their way", how, copies * number * size, "host")
    tokens = batch_tokens(config)
    how = f"{tokens} tokens x 32 bytes, before and after they are scored"
    yield Term("trajectories of a step", how, 2 * tokens * 32, "host")


def node_terms() -> Iterator[Term]:
    """Yield what every node holds, whichever actors it has."""
    how = "its own processes, the driver's where that runs, and the libraries' files, which all processes share"
    yield Term("Ray", how, _NODE_MIB * MIB, "host")


def disk_terms(config: Config, sizes: ModelSizes) -> Iterator[Term]:
    """Yield what the run writes to disk: the checkpoints that are kept, and the one that is being written."""
    trained = count_trainable(sizes)
    copies = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    how = f"{copies} x {format_count(trained)} x {(size := 3 * EXACT)} bytes: weights and Adam's moments, "
    how += "checkpoint.keep_last and one more" + (", and the best" if config.checkpoint.keep_best else "")
    yield Term("checkpoints", how, copies * trained * size, "host")


def checkpoint_bytes(sizes: ModelSizes) -> int:
    """Return the size of a checkpoint: weights and Adam's moments; the rest is small."""
    return 3 * EXACT * count_trainable(sizes)


def format_count(number: int) -> str:
    """Format a number of parameters, e.g. `134.5M`."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def count_traffic(config: Config, sizes: ModelSizes) -> tuple[int, int]:
    """Return the number of parameters that are sent to the engines, and the bytes of each on its way."""
    if sends_adapters(config):
        return sizes.policy.adapters, BYTES[config.rollout.wire_dtype or "float32"]
    return sizes.policy.parameters, BYTES[config.rollout.wire_dtype or config.model.dtype]


def batch_tokens(config: Config) -> int:
    """Return the tokens of a step's prompts and responses, at most."""
    return config.rollout.batch_size * (config.prompts.max_tokens + config.rollout.max_response_tokens)


def likely_tokens(config: Config) -> int:
    """Return the tokens of a step's prompts and responses, hardly ever more: `batch_tokens` where none are drawn.

    A length that is drawn from a to b has the mean (a + b) / 2 and the variance ((b - a + 1)^2 - 1) / 12. It is the
    mean of the sum, and three of its standard deviations.
    """
    prompts, rollout = config.prompts, config.rollout
    prompt_lengths = (rollout.responses_per_prompt, rollout.num_prompts, prompts.min_tokens, prompts.max_tokens)
    return _add_up(prompt_lengths, _response_lengths(config))


def likely_response_tokens(config: Config) -> int:
    """Return the tokens of a step's responses, hardly ever more, as `likely_tokens`."""
    return _add_up(_response_lengths(config))


def _response_lengths(config: Config) -> tuple[int, int, int | None, int]:
    return 1, config.rollout.batch_size, config.rollout.min_response_tokens, config.rollout.max_response_tokens


def _add_up(*lengths: tuple[int, int, int | None, int]) -> int:
    """Add up lengths that are drawn, of which each has: how often it counts, how many there are, shortest, longest."""
    mean = variance = most = 0.0
    for times, number, drawn_from, longest in lengths:
        shortest = longest if drawn_from is None else drawn_from
        most += times * number * longest
        mean += times * number * (shortest + longest) / 2
        variance += times**2 * number * ((longest - shortest + 1) ** 2 - 1) / 12
    return math.ceil(min(most, mean + 3 * math.sqrt(variance)))


def parameter_term(what: str, number: int, size: int, device: Device, when: When = "always", ranks: int = 1) -> Term:
    """Return the term of a number of parameters, each of `size` bytes, shared by ranks."""
    share = f" / {ranks} ranks" if ranks > 1 else ""
    return Term(what, f"{format_count(number)} x {size} bytes{share}", -(-number * size // ranks), device, when)


def process_term(kind: str, name: str) -> Term:
    """Return what a process holds without a model."""
    return Term("process", f"Python and the libraries of a {name} worker", _PROCESS_MIB[kind] * MIB, "host")


def cuda_term(kind: str) -> Term:
    """Return what a process holds on its GPU without a model."""
    return Term("CUDA", "context, kernels and workspace, assumed", _CUDA_MIB[kind] * MIB, "gpu")


def bucket_term(config: Config, transport: str) -> Term:
    """Return the buffer on a GPU that weights are sent from, or received in; one tensor may be larger."""
    mib = config.rollout.weight_bucket_mib
    return Term(f"a bucket of weights ({transport})", f"rollout.weight_bucket_mib={mib}", mib * MIB, "gpu")


def count_trainable(sizes: ModelSizes) -> int:
    """Return the parameters that the optimizer steps: all of them, or those of adapters and the value head."""
    if not sizes.has_values:
        return sizes.policy.trained
    values = sizes.critic.trained + sizes.critic.hidden if sizes.critic else sizes.policy.hidden
    return sizes.policy.trained + values + 1
