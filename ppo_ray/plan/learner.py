"""Estimates of the memory that a learner rank holds: its state, and the moment of a pass that takes most beside it."""

import math
from collections.abc import Iterator
from functools import partial

from ppo_ray.config import Config
from ppo_ray.config.transport import weight_transport
from ppo_ray.plan.memory import (
    BYTES,
    EXACT,
    Device,
    Term,
    When,
    bucket_term,
    count_traffic,
    count_trainable,
    cuda_term,
    format_count,
    likely_response_tokens,
    likely_tokens,
    parameter_term,
    process_term,
)
from ppo_ray.plan.sizes import ModelSize, ModelSizes

STATE: tuple[tuple[str, int, When], ...] = (
    ("float32 weights", EXACT, "always"),
    ("gradients", EXACT, "at work"),
    ("Adam's two moments", 2 * EXACT, "always"),
)
"""Bytes of each trained parameter: on every rank, or shared by all ranks under fsdp2."""
_SHORTEST_ROW = 64  # tokens, as the learner packs them
KEPT_ENTRIES = 1 << 28
"""Probabilities that a pass keeps, at most, and those that a GPU computes at a time beyond; `models/token_logprobs.py`
has the same."""


def learner_terms(config: Config, sizes: ModelSizes, rank: int) -> Iterator[Term]:
    """Yield what a learner rank holds; rank 0 also copies what it publishes."""
    device: Device = "gpu" if config.learner.gpus else "host"
    yield process_term("learner", "learner")
    if device == "gpu":
        yield cuda_term("learner")
    state = list(_state_terms(config, sizes, device, rank))
    yield from (term for term in state if term.when == "always")
    passing = list(_pass_terms(config, sizes, device, [term for term in state if term.when == "at work"]))
    transport = weight_transport(config)
    if transport != "object_store" and (rank == 0 or transport == "ipc"):
        yield bucket_term(config, transport)
    if rank == 0 and transport == "object_store":
        published = _bucket_of_weights(config, sizes)
        if device == "gpu":
            yield published
        elif published.num_bytes > sum(term.num_bytes for term in passing):
            passing = [published]  # in memory that a pass has freed
    yield from passing
    if device == "gpu" or _is_shared(config):  # else it is written of what is there
        trained, by = count_trainable(sizes), config.learner.workers
        yield parameter_term("a checkpoint on its way to the disk", trained, 3 * EXACT, "host", ranks=by)


def _state_terms(config: Config, sizes: ModelSizes, device: Device, rank: int) -> Iterator[Term]:
    """Yield models, gradients and optimizer."""
    size, shared, by = BYTES[config.model.dtype], _is_shared(config), _count_sharers(config)
    adapted, trained, away = config.model.lora is not None, count_trainable(sizes), config.learner.offload
    has_masters = size != EXACT and not shared and not adapted
    for what, number, when in STATE:
        name = "float32 adapters and value head" if adapted and what.endswith("weights") else what
        moves = "optimizer" in away and (what.startswith("Adam") or (what.endswith("weights") and has_masters))
        yield parameter_term(name, trained, number, device, "at work" if moves else when, by)
        if moves:
            yield parameter_term(f"{name}, when they are not at work", trained, number, "host", ranks=by)
    if shared and config.learner.reduce_gradients == "minibatch":
        yield parameter_term("full gradients, before they are reduced", trained, EXACT, device, "at work")
    if adapted:
        yield from _base_terms("frozen base", config, sizes.policy, device, by)
        if sizes.critic and (config.model.critic_path is not None or shared):
            yield from _base_terms("the critic's frozen base", config, sizes.critic, device, by)
    reference = _find_reference(config, sizes)
    if reference and "reference" in away:
        yield parameter_term("reference, when it is not at work", reference.parameters, size, "host", ranks=by)
    elif reference:
        yield parameter_term("reference", reference.parameters, size, device, ranks=by)
    if shared and rank == 0:
        models = (sizes.policy, sizes.critic, reference)
        largest = max(model.parameters for model in models if model)
        yield parameter_term("the largest model, before it is shared out", largest, EXACT, "host")
    elif has_masters:
        yield parameter_term(f"{config.model.dtype} weights", _actor_critic_parameters(sizes), size, device)


def _base_terms(what: str, config: Config, model: ModelSize, device: Device, ranks: int) -> Iterator[Term]:
    """Yield a frozen model: its weights, and the codes and scales of those that are quantised."""
    yield parameter_term(what, model.parameters - model.mapped, BYTES[config.model.dtype], device, ranks=ranks)
    if model.mapped:
        bits = f"{8 * model.code_bytes / model.mapped:.4g} bits ({config.model.quantization})"
        yield Term(f"{what} in codes", f"{format_count(model.mapped)} x {bits}", model.code_bytes, device)
        yield parameter_term(f"{what}, before it gets codes", model.parameters, EXACT, "host")


def _pass_terms(config: Config, sizes: ModelSizes, device: Device, state: list[Term]) -> Iterator[Term]:
    """Yield what is there at work alone, forwards and backwards, at the moment at which that is most.

    The moments are four, each with the part of the state that is there at work alone: the policy's head in the backward
    pass, a layer's, a separate critic's (which comes first), and under fsdp2 the reduction of the embeddings' gradients
    at the end. Before all of them is a fifth, a forward pass beside a reference that lies in host memory otherwise.
    `tests/plan/test_traced_memory.py` holds them to the learner's own code.
    """
    tokens = min(config.learner.microbatch_tokens, likely_tokens(config))
    size, policy, critic = BYTES[config.model.dtype], sizes.policy, sizes.critic
    recomputed, shared = config.learner.gradient_checkpointing, _is_shared(config)
    adapted = config.model.lora is not None  # then nothing else in the models has a gradient

    attention = partial(_attention_terms, config, policy.hidden, tokens, device)

    predicted = min(tokens, likely_response_tokens(config))
    again = predicted * policy.vocabulary > KEPT_ENTRIES  # then logits are computed again, block by block

    def probabilities(each: int) -> Term:
        block = min(predicted, 512 if device == "host" else KEPT_ENTRIES // policy.vocabulary) if again else predicted
        how = f"{block} tokens x {policy.vocabulary} entries x {each} bytes, " + ("a block" if again else "at most")
        return Term("probabilities", how, block * policy.vocabulary * each, device, "at work")

    def parameters(what: str, number: int, each: int) -> Term:
        return parameter_term(what, number, each, device, "at work")

    trained = [model for model in (policy, critic) if model]
    roots = sum(model.embeddings for model in trained)
    layer = max((model.parameters - model.embeddings) // model.layers for model in trained)
    kept = [_activation_term("activations", policy, tokens, size, device, recomputed)]
    kept += [] if recomputed else attention("", policy, policy.layers)
    gathered = [parameters("gathered: embeddings, a layer", roots + layer, size)] if shared else []
    learned = policy.adapters // policy.layers if adapted else layer
    decoded = max((math.prod(shape) for model in trained for shape in model.maps), default=0)
    each_reduced = size + BYTES[config.learner.reduce_dtype]
    reduced = [parameters("a layer's gradients that are being reduced", learned, each_reduced)] if shared else []
    rounded = size != EXACT
    head = [*kept, probabilities(EXACT + size * rounded), *gathered]  # their gradient is rounded into a copy
    if again and not adapted:
        head += [parameters("the head's gradient, which is being summed", policy.vocabulary * policy.hidden, EXACT)]
    backward = [*kept, _layer_term("a layer's backward pass", policy, tokens, size, device, recomputed)]
    backward += attention("a layer's ", policy, 1) if recomputed else []
    if decoded:
        each = size if config.model.quantization == "nf4" else 2 * EXACT
        backward += [parameters("a weight made of its codes", decoded, each)]
    if (rounded or shared) and not adapted:
        backward += [parameters("the embeddings' gradients", policy.embeddings, size)]
    moments = [head, [*backward, *gathered, *reduced]]
    if critic:
        first = kept if again else [*kept, probabilities(EXACT)]
        first = [*first, _activation_term("the critic's activations", critic, tokens, size, device, recomputed)]
        first += [] if recomputed else attention("the critic's ", critic, critic.layers)
        first += [_layer_term("a critic's layer's backward pass", critic, tokens, size, device, recomputed)]
        moments += [[*first, *gathered, *reduced]]
    if shared and not adapted:
        moments += [[parameters("the embeddings' gradients that are being reduced", roots, each_reduced)]]
    moments = [[*state, *moment] for moment in moments]
    if "reference" in config.learner.offload and (reference := _find_reference(config, sizes)):
        own = parameter_term("reference", reference.parameters, size, device, "at work", _count_sharers(config))
        rest = [parameters("gathered: the reference's embeddings", reference.embeddings, size)] if shared else []
        moments += [[own, *rest, *kept, probabilities(EXACT), *gathered]]
    yield from max(moments, key=lambda moment: sum(term.num_bytes for term in moment))


def _find_reference(config: Config, sizes: ModelSizes) -> ModelSize | None:
    """Return the size of the reference, if it has weights of its own: with adapters it may be the policy's base."""
    return None if config.model.lora is not None and config.model.reference_path is None else sizes.reference


def _count_sharers(config: Config) -> int:
    """Return the number of ranks that hold one copy of the state between them."""
    return (config.learner.shard_size or config.learner.workers) if _is_shared(config) else 1


def _bucket_of_weights(config: Config, sizes: ModelSizes) -> Term:
    """Count the bucket that weights are copied into on their way to the object store; one tensor may be larger."""
    number, size = count_traffic(config, sizes)
    mib, widest = config.rollout.weight_bucket_mib, sizes.policy.vocabulary * sizes.policy.hidden * size
    num_bytes = min(number * size, max(mib << 20, widest))
    return Term("a bucket of weights to publish", f"rollout.weight_bucket_mib={mib}, at most", num_bytes, "host")


def _is_shared(config: Config) -> bool:
    return config.learner.sharding == "fsdp2" and config.learner.workers > 1


def widest_row(config: Config, hidden: int) -> int:
    """Return the tokens of a row under a mask, at most: of sequences that begin alike and share these tokens.

    As `models/packing.py` lays them out, where prompts have all in common that they can: rows are filled up to that
    width, or a quarter more. Other sequences lie end to end without a mask.

    Args:
        config: of the run.
        hidden: width of the policy's states, by which it pays to share the beginnings of prompts.
    """
    tokens = config.learner.microbatch_tokens
    narrowest = max(_SHORTEST_ROW, min(tokens, math.isqrt(4 * config.prompts.max_tokens * hidden)))
    return max(_SHORTEST_ROW, min(tokens, narrowest + narrowest // 4))


def _activation_term(what: str, model: ModelSize, tokens: int, size: int, device: Device, recomputed: bool) -> Term:
    """Count what is kept for the backward pass: each layer's input alone, or all that the layers keep."""
    if recomputed:
        how = f"{tokens} tokens x {model.layers} layers x {model.hidden} x {size} bytes"
        return Term(what, how, tokens * model.layers * model.hidden * size, device, "at work")
    how = f"{tokens} tokens x {model.activation_bytes} bytes that {model.layers} layers keep"
    return Term(what, how, tokens * model.activation_bytes, device, "at work")


def _layer_term(what: str, model: ModelSize, tokens: int, size: int, device: Device, recomputed: bool) -> Term:
    """Count the gradients in a layer's backward pass; recomputed: its activations too."""
    hidden, kept = (2, model.activation_bytes // model.layers) if recomputed else (5, 0)
    how = f"{tokens} tokens x ({hidden} x {model.hidden} + 2 x {model.intermediate}) x {size} bytes"
    how += f", and {kept} bytes that a layer keeps" if kept else ""
    num_bytes = tokens * ((hidden * model.hidden + 2 * model.intermediate) * size + kept)
    return Term(what, how, num_bytes, device, "at work")


def _attention_terms(
    config: Config, hidden: int, tokens: int, device: Device, whose: str, model: ModelSize, layers: int
) -> list[Term]:
    """Count what attention needs besides its inputs: masks on a GPU, and on a CPU the probabilities that it keeps.

    Of each query a CPU keeps those of (length + 32) / 2 keys on average: `models/block_attention.py`.
    """
    if device == "gpu":
        width, size = widest_row(config, hidden), BYTES[config.model.dtype]
        how = f"{tokens} tokens x {width} x {layers} layers x {size} bytes"
        return [Term(f"{whose}attention masks", how, tokens * width * layers * size, device, "at work")]
    length = math.ceil(likely_tokens(config) / config.rollout.batch_size)
    if not model.sharing_heads or length > 256:
        return []
    keys = min(length, (length + 32) // 2)
    how = f"{tokens} tokens x {model.sharing_heads} heads x {keys} keys x {layers} layers x {EXACT} bytes"
    num_bytes = tokens * model.sharing_heads * keys * layers * EXACT
    return [Term(f"{whose}attention probabilities", how, num_bytes, device, "at work")]


def _actor_critic_parameters(sizes: ModelSizes) -> int:
    """Return the parameters of the policy and of what estimates its values, if anything does."""
    if not sizes.has_values:
        return sizes.policy.parameters
    values = sizes.critic.parameters + sizes.critic.hidden if sizes.critic else sizes.policy.hidden
    return sizes.policy.parameters + values + 1
