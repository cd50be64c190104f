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
from ppo_ray.plan.sizes import ModelSize, ModelSizes

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


STATE: tuple[tuple[str, int, When], ...] = (
    ("float32 weights", EXACT, "always"),
    ("gradients", EXACT, "at work"),
    ("Adam's two moments", 2 * EXACT, "always"),
)
"""Bytes of each trained parameter: on every rank, or shared by all ranks under fsdp2."""
_PROCESS_MIB = {"rollout": 750, "hf": 500, "reward": 500, "learner": 550}
"""Python with its libraries, without a model worth mention: measured, see `docs/gpus.md`."""
_NODE_MIB = 1200
_CUDA_MIB = {"rollout": 4000, "reward": 800, "learner": 1000}
"""CUDA's context and kernels, an engine's graphs and the pass that it measures itself by: assumed, not measured."""
_SHORTEST_ROW = 64  # tokens, as the learner packs them


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
        number, size = _count_traffic(config, sizes)
        how = f"2 x {_format_count(number)} x {size} bytes: the engines' and the next"
        yield Term("weights on their way", how, 2 * number * size, "host")
    tokens = _batch_tokens(config)
    how = f"{tokens} tokens x 32 bytes, before and after they are scored"
    yield Term("trajectories of a step", how, 2 * tokens * 32, "host")


def node_terms() -> Iterator[Term]:
    """Yield what every node holds, whichever actors it has."""
    yield Term("Ray", "its own processes, and the driver's where that runs", _NODE_MIB * MIB, "host")


def disk_terms(config: Config, sizes: ModelSizes) -> Iterator[Term]:
    """Yield what the run writes to disk: the checkpoints that are kept, and the one that is being written."""
    trained = _count_trainable(sizes)
    copies = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    how = f"{copies} x {_format_count(trained)} x {(size := 3 * EXACT)} bytes: weights and Adam's moments, "
    how += "checkpoint.keep_last and one more" + (", and the best" if config.checkpoint.keep_best else "")
    yield Term("checkpoints", how, copies * trained * size, "host")


def checkpoint_bytes(sizes: ModelSizes) -> int:
    """Return the size of a checkpoint: weights and Adam's moments; the rest is small."""
    return 3 * EXACT * _count_trainable(sizes)


def _format_count(number: int) -> str:
    """Format a number of parameters, e.g. `134.5M`."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def _count_traffic(config: Config, sizes: ModelSizes) -> tuple[int, int]:
    """Return the number of parameters that are sent to the engines, and the bytes of each on its way."""
    if sends_adapters(config):
        return sizes.policy.adapters, BYTES[config.rollout.wire_dtype or "float32"]
    return sizes.policy.parameters, BYTES[config.rollout.wire_dtype or config.model.dtype]


def _batch_tokens(config: Config) -> int:
    """Return the tokens of a step's prompts and responses, at most."""
    return config.rollout.batch_size * (config.prompts.max_tokens + config.rollout.max_response_tokens)


def parameter_term(what: str, number: int, size: int, device: Device, when: When = "always", ranks: int = 1) -> Term:
    """Return the term of a number of parameters, each of `size` bytes, shared by ranks."""
    share = f" / {ranks} ranks" if ranks > 1 else ""
    return Term(what, f"{_format_count(number)} x {size} bytes{share}", -(-number * size // ranks), device, when)


def process_term(kind: str, name: str) -> Term:
    """Return what a process holds without a model."""
    return Term("process", f"Python and the libraries of a {name} worker", _PROCESS_MIB[kind] * MIB, "host")


def cuda_term(kind: str) -> Term:
    """Return what a process holds on its GPU without a model."""
    return Term("CUDA", "context, kernels and workspace, assumed", _CUDA_MIB[kind] * MIB, "gpu")


def learner_terms(config: Config, sizes: ModelSizes, rank: int) -> Iterator[Term]:
    """Yield what a learner rank holds; rank 0 also copies what it publishes."""
    device: Device = "gpu" if config.learner.gpus else "host"
    yield process_term("learner", "learner")
    if device == "gpu":
        yield cuda_term("learner")
    yield from _state_terms(config, sizes, device)
    yield from _pass_terms(config, sizes, device)
    transport = weight_transport(config)
    if transport != "object_store" and (rank == 0 or transport == "ipc"):
        yield bucket_term(config, transport)
    if rank == 0 and transport == "object_store":
        yield parameter_term("weights to publish", *_count_traffic(config, sizes), "host")
    trained, by = _count_trainable(sizes), config.learner.workers
    yield parameter_term("a checkpoint on its way to the disk", trained, 3 * EXACT, "host", ranks=by)


def bucket_term(config: Config, transport: str) -> Term:
    """Return the buffer on a GPU that weights are sent from, or received in; one tensor may be larger."""
    mib = config.rollout.weight_bucket_mib
    return Term(f"a bucket of weights ({transport})", f"rollout.weight_bucket_mib={mib}", mib * MIB, "gpu")


def _state_terms(config: Config, sizes: ModelSizes, device: Device) -> Iterator[Term]:
    """Yield models, gradients and optimizer."""
    size, ranks = BYTES[config.model.dtype], config.learner.workers
    shared = _is_shared(config)
    by = ranks if shared else 1
    adapted, trained = config.model.lora is not None, _count_trainable(sizes)
    for what, number, when in STATE:
        name = "float32 adapters and value head" if adapted and what.endswith("weights") else what
        yield parameter_term(name, trained, number, device, when, by)
    if adapted:
        yield from _base_terms("frozen base", config, sizes.policy, device, by)
        if sizes.critic and (config.model.critic_path is not None or shared):
            yield from _base_terms("the critic's frozen base", config, sizes.critic, device, by)
    reference = None if adapted and config.model.reference_path is None else sizes.reference
    if reference:
        yield parameter_term("reference", reference.parameters, size, device, ranks=by)
    if shared:
        whole = _actor_critic_parameters(sizes) + (reference.parameters if reference else 0)
        yield parameter_term("whole models, before they are shared", whole, EXACT, "host")
    elif size != EXACT and not adapted:
        yield parameter_term(f"{config.model.dtype} weights", _actor_critic_parameters(sizes), size, device)


def _base_terms(what: str, config: Config, model: ModelSize, device: Device, ranks: int) -> Iterator[Term]:
    """Yield a frozen model: its weights, and the codes and scales of those that are quantised."""
    yield parameter_term(what, model.parameters - model.mapped, BYTES[config.model.dtype], device, ranks=ranks)
    if model.mapped:
        bits = f"{8 * model.code_bytes / model.mapped:.4g} bits ({config.model.quantization})"
        yield Term(f"{what} in codes", f"{_format_count(model.mapped)} x {bits}", model.code_bytes, device)
        yield parameter_term(f"{what}, before it gets codes", model.parameters, EXACT, "host")


def _pass_terms(config: Config, sizes: ModelSizes, device: Device) -> Iterator[Term]:
    """Yield what a pass takes beside the state, forwards and backwards, at the moment at which that is most.

    The moments are four: the policy's head in the backward pass, a layer's, a separate critic's (which comes first),
    and under fsdp2 the reduction of the embeddings' gradients at the end. `tests/plan/test_traced_memory.py` holds
    them to the learner's own code.
    """
    tokens = min(config.learner.microbatch_tokens, _batch_tokens(config))
    size, policy, critic = BYTES[config.model.dtype], sizes.policy, sizes.critic
    recomputed, shared = config.learner.gradient_checkpointing, _is_shared(config)
    adapted = config.model.lora is not None  # then nothing else in the models has a gradient

    def masks(what: str, layers: int) -> list[Term]:
        width = widest_row(config, policy.hidden)
        how = f"{tokens} tokens x {width} x {layers} layers x {size} bytes"
        return [Term(what, how, tokens * width * layers * size, device, "at work")] if device == "gpu" else []

    def probabilities(each: int) -> Term:
        how = f"{tokens} tokens x {policy.vocabulary} entries x {each} bytes, at most"
        return Term("probabilities", how, tokens * policy.vocabulary * each, device, "at work")

    def parameters(what: str, number: int, each: int) -> Term:
        return parameter_term(what, number, each, device, "at work")

    trained = [model for model in (policy, critic) if model]
    roots = sum(model.embeddings for model in trained)
    layer = max((model.parameters - model.embeddings) // model.layers for model in trained)
    kept = [_activation_term("activations", policy, tokens, size, device, recomputed)]
    kept += [] if recomputed else masks("attention masks", policy.layers)
    gathered = [parameters("gathered: embeddings, a layer", roots + layer, size)] if shared else []
    learned = policy.adapters // policy.layers if adapted else layer
    decoded = max((math.prod(shape) for model in trained for shape in model.maps), default=0)
    reduced = [parameters("a layer's gradients that are being reduced", learned, size + EXACT)] if shared else []
    rounded = size != EXACT
    head = [*kept, probabilities(EXACT + size * rounded), *gathered]  # their gradient is rounded into a copy
    backward = [*kept, _layer_term("a layer's backward pass", policy, tokens, size, device, recomputed)]
    backward += masks("a layer's attention mask", 1) if recomputed else []
    if decoded:
        each = size if config.model.quantization == "nf4" else 2 * EXACT
        backward += [parameters("a weight made of its codes", decoded, each)]
    if (rounded or shared) and not adapted:
        backward += [parameters("the embeddings' gradients", policy.embeddings, size)]
    moments = [head, [*backward, *gathered, *reduced]]
    if critic:
        first = [*kept, probabilities(EXACT)]
        first += [_activation_term("the critic's activations", critic, tokens, size, device, recomputed)]
        first += [] if recomputed else masks("the critic's attention masks", critic.layers)
        first += [_layer_term("a critic's layer's backward pass", critic, tokens, size, device, recomputed)]
        moments += [[*first, *gathered, *reduced]]
    if shared and not adapted:
        moments += [[parameters("the embeddings' gradients that are being reduced", roots, size + EXACT)]]
    yield from max(moments, key=lambda moment: sum(term.num_bytes for term in moment))


def _is_shared(config: Config) -> bool:
    return config.learner.sharding == "fsdp2" and config.learner.workers > 1


def widest_row(config: Config, hidden: int) -> int:
    """Return the tokens of a packed row, at most: one sequence, several short ones, or several that begin alike.

    As `models/packing.py` lays them out, where prompts have all in common that they can: rows are filled up to that
    width, or a quarter more.

    Args:
        config: of the run.
        hidden: width of the policy's states, by which it pays to share the beginnings of prompts.
    """
    longest = config.prompts.max_tokens + config.rollout.max_response_tokens
    narrowest = max(_SHORTEST_ROW, longest, math.isqrt(4 * config.prompts.max_tokens * hidden))
    return max(longest, min(config.learner.microbatch_tokens, narrowest + narrowest // 4))


def _activation_term(what: str, model: ModelSize, tokens: int, size: int, device: Device, recomputed: bool) -> Term:
    """Count what is kept for the backward pass: each layer's input, or 12 hidden and 4 feed-forward widths a layer."""
    width, how = 12 * model.hidden + 4 * model.intermediate, f"(12 x {model.hidden} + 4 x {model.intermediate})"
    if recomputed:
        width, how = model.hidden, f"{model.hidden}"
    num_bytes = tokens * model.layers * width * size
    return Term(what, f"{tokens} tokens x {model.layers} layers x {how} x {size} bytes", num_bytes, device, "at work")


def _layer_term(what: str, model: ModelSize, tokens: int, size: int, device: Device, recomputed: bool) -> Term:
    """Count the gradients in a layer's backward pass; recomputed: its activations too."""
    hidden, intermediate = (14, 6) if recomputed else (5, 2)
    width = hidden * model.hidden + intermediate * model.intermediate
    how = f"{tokens} tokens x ({hidden} x {model.hidden} + {intermediate} x {model.intermediate}) x {size} bytes"
    return Term(what, how, tokens * width * size, device, "at work")


def _count_trainable(sizes: ModelSizes) -> int:
    """Return the parameters that the optimizer steps: all of them, or those of adapters and the value head."""
    if not sizes.has_values:
        return sizes.policy.trained
    values = sizes.critic.trained + sizes.critic.hidden if sizes.critic else sizes.policy.hidden
    return sizes.policy.trained + values + 1


def _actor_critic_parameters(sizes: ModelSizes) -> int:
    """Return the parameters of the policy and of what estimates its values, if anything does."""
    if not sizes.has_values:
        return sizes.policy.parameters
    values = sizes.critic.parameters + sizes.critic.hidden if sizes.critic else sizes.policy.hidden
    return sizes.policy.parameters + values + 1
