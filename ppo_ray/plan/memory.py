"""Estimates of the memory that the processes of a run hold: a few terms for each actor, from the sizes of the models.

`docs/gpus.md` compares them with measurements.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ppo_ray.config import Config
from ppo_ray.config.transport import weight_transport
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
        size = _wire_bytes(config)
        how = f"2 x {_format_count(sizes.policy.parameters)} x {size} bytes: the engines' and the next"
        yield Term("weights on their way", how, 2 * sizes.policy.parameters * size, "host")
    tokens = _batch_tokens(config)
    how = f"{tokens} tokens x 32 bytes, before and after they are scored"
    yield Term("trajectories of a step", how, 2 * tokens * 32, "host")


def node_terms() -> Iterator[Term]:
    """Yield what every node holds, whichever actors it has."""
    yield Term("Ray", "its own processes, and the driver's where that runs", _NODE_MIB * MIB, "host")


def disk_terms(config: Config, sizes: ModelSizes) -> Iterator[Term]:
    """Yield what the run writes to disk: the checkpoints that are kept, and the one that is being written."""
    trained = _actor_critic_parameters(sizes)
    copies = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    size = 3 * EXACT
    how = f"{copies} x {_format_count(trained)} x {size} bytes: weights and Adam's moments, "
    how += "checkpoint.keep_last and one more" + (", and the best" if config.checkpoint.keep_best else "")
    yield Term("checkpoints", how, copies * trained * size, "host")


def _format_count(number: int) -> str:
    """Format a number of parameters, e.g. `134.5M`."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def _wire_bytes(config: Config) -> int:
    """Return the bytes of a parameter on its way to the engines."""
    return BYTES[config.rollout.wire_dtype or config.model.dtype]


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
    """Yield what a learner rank holds; rank 0 also copies what it publishes and saves."""
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
        yield parameter_term("weights to publish", sizes.policy.parameters, _wire_bytes(config), "host")
    if rank == 0 and device == "gpu":
        yield parameter_term("a checkpoint on its way to the disk", _actor_critic_parameters(sizes), 3 * EXACT, "host")


def bucket_term(config: Config, transport: str) -> Term:
    """Return the buffer on a GPU that weights are sent from, or received in; one tensor may be larger."""
    mib = config.rollout.weight_bucket_mib
    return Term(f"a bucket of weights ({transport})", f"rollout.weight_bucket_mib={mib}", mib * MIB, "gpu")


def _state_terms(config: Config, sizes: ModelSizes, device: Device) -> Iterator[Term]:
    """Yield models, gradients and optimizer."""
    size, ranks = BYTES[config.model.dtype], config.learner.workers
    shared = config.learner.sharding == "fsdp2" and ranks > 1
    by = ranks if shared else 1
    for what, number, when in STATE:
        yield parameter_term(what, _actor_critic_parameters(sizes), number, device, when, by)
    yield parameter_term("reference", sizes.reference.parameters, size, device, ranks=by)
    if shared:
        models = [model for model in (sizes.policy, sizes.reference, sizes.critic) if model]
        layer = max((model.parameters - model.embeddings) // model.layers for model in models)
        gathered = sum(model.embeddings for model in models) + 2 * layer
        yield parameter_term("gathered: embeddings, two layers", gathered, size, device, "at work")
        roots = sum(model.embeddings for model in (sizes.policy, sizes.critic) if model)
        reduced = max(roots, layer)
        yield parameter_term("gradients that are being reduced", reduced, size + EXACT, device, "at work")
        whole = _actor_critic_parameters(sizes) + sizes.reference.parameters
        yield parameter_term("whole models, before they are shared", whole, EXACT, "host")
    elif size != EXACT:
        yield parameter_term(f"{config.model.dtype} weights", _actor_critic_parameters(sizes), size, device)


def _pass_terms(config: Config, sizes: ModelSizes, device: Device) -> Iterator[Term]:
    """Yield what a forward pass keeps for the backward pass."""
    tokens = min(config.learner.microbatch_tokens, _batch_tokens(config))
    size, recomputed = BYTES[config.model.dtype], config.learner.gradient_checkpointing
    yield _activation_term("activations", sizes.policy, tokens, size, device, recomputed)
    if sizes.critic:
        yield _activation_term("the critic's activations", sizes.critic, tokens, size, device, recomputed)
    if device == "gpu":
        width, layers = _row_width(config), 1 if recomputed else sizes.policy.layers
        how = f"{tokens} tokens x {width} x {layers} layers x {size} bytes"
        yield Term("attention masks", how, tokens * width * layers * size, device, "at work")
    each = EXACT + (size if size != EXACT else 0)  # their gradient is rounded into a copy
    how = f"{tokens} tokens x {sizes.policy.vocabulary} entries x {each} bytes, at most"
    yield Term("probabilities", how, tokens * sizes.policy.vocabulary * each, device, "at work")


def _row_width(config: Config) -> int:
    """Return the tokens of a packed row, at most: one sequence, or several short ones."""
    return max(_SHORTEST_ROW, config.prompts.max_tokens + config.rollout.max_response_tokens)


def _activation_term(what: str, model: ModelSize, tokens: int, size: int, device: Device, recomputed: bool) -> Term:
    """Count 12 hidden and 4 feed-forward widths per token and layer; recomputed: each layer's input, and one layer."""
    width, figures = 12 * model.hidden + 4 * model.intermediate, f"12 x {model.hidden} + 4 x {model.intermediate}"
    each_token, how = model.layers * width, f"{model.layers} layers x ({figures})"
    if recomputed:
        each_token, how = model.layers * model.hidden + width, f"({model.layers} layers x {model.hidden} + {figures})"
    return Term(what, f"{tokens} tokens x {how} x {size} bytes", tokens * each_token * size, device, "at work")


def _actor_critic_parameters(sizes: ModelSizes) -> int:
    """Return the parameters of the policy and of what estimates its values, if anything does."""
    if not sizes.has_values:
        return sizes.policy.parameters
    values = sizes.critic.parameters + sizes.critic.hidden if sizes.critic else sizes.policy.hidden
    return sizes.policy.parameters + values + 1
