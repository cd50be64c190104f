"""What a learner rank holds: its models as `learner.sharding` lays them out, and what a forward pass leaves behind."""

from collections.abc import Iterator

from ppo_ray.config import Config
from ppo_ray.config.transport import weight_transport
from ppo_ray.plan.memory import BYTES, EXACT, Device, Term, When, batch_tokens, cuda, each, process, wire_bytes
from ppo_ray.plan.sizes import ModelSize, ModelSizes

STATE: tuple[tuple[str, int, When], ...] = (
    ("float32 weights", EXACT, "always"),
    ("gradients", EXACT, "at work"),
    ("Adam's two moments", 2 * EXACT, "always"),
)
"""Bytes for each parameter that is trained: on every rank, or shared by them under fsdp2."""


def learner_terms(config: Config, sizes: ModelSizes, rank: int) -> Iterator[Term]:
    """Yield what a learner rank holds; the first one also copies what it publishes and saves."""
    device: Device = "gpu" if config.learner.gpus else "host"
    yield process("learner", "learner")
    if device == "gpu":
        yield cuda("learner")
    yield from _state(config, sizes, device)
    yield from _passes(config, sizes, device)
    if rank == 0 and weight_transport(config) == "object_store":
        yield each("weights to publish", sizes.policy.parameters, wire_bytes(config), "host")
    if rank == 0 and device == "gpu":
        yield each("a checkpoint on its way to the disk", _trained(sizes), 3 * EXACT, "host")


def _state(config: Config, sizes: ModelSizes, device: Device) -> Iterator[Term]:
    """Yield models, gradients and optimizer."""
    size, ranks = BYTES[config.model.dtype], config.learner.workers
    shared = config.learner.sharding == "fsdp2" and ranks > 1
    by = ranks if shared else 1
    for what, number, when in STATE:
        yield each(what, _trained(sizes), number, device, when, by)
    yield each("reference", sizes.reference.parameters, size, device, ranks=by)
    if shared:
        models = [model for model in (sizes.policy, sizes.reference, sizes.critic) if model]
        layer = max((model.parameters - model.embeddings) // model.layers for model in models)
        gathered = sum(model.embeddings for model in models) + 2 * layer
        yield each("gathered: embeddings, two layers", gathered, size, device, "at work")
        whole = _trained(sizes) + sizes.reference.parameters
        yield each("whole models, before they are shared", whole, EXACT, "host")
    elif size != EXACT:
        yield each(f"{config.model.dtype} weights", _trained(sizes), size, device)


def _passes(config: Config, sizes: ModelSizes, device: Device) -> Iterator[Term]:
    """Yield what a backward pass needs of a forward pass."""
    tokens = min(config.learner.microbatch_tokens, batch_tokens(config))
    size, recomputed = BYTES[config.model.dtype], config.learner.gradient_checkpointing
    yield _activations("activations", sizes.policy, tokens, size, device, recomputed)
    if sizes.critic:
        yield _activations("the critic's activations", sizes.critic, tokens, size, device, recomputed)
    how = f"{tokens} tokens x {sizes.policy.vocabulary} entries x 4 bytes, at most"
    yield Term("probabilities", how, tokens * sizes.policy.vocabulary * 4, device, "at work")


def _activations(what: str, model: ModelSize, tokens: int, size: int, device: Device, recomputed: bool) -> Term:
    """Count 12 hidden and 4 feed-forward widths a token and layer; recomputed, a layer's input, and one layer whole."""
    width, figures = 12 * model.hidden + 4 * model.intermediate, f"12 x {model.hidden} + 4 x {model.intermediate}"
    each_token, how = model.layers * width, f"{model.layers} layers x ({figures})"
    if recomputed:
        each_token, how = model.layers * model.hidden + width, f"({model.layers} layers x {model.hidden} + {figures})"
    return Term(what, f"{tokens} tokens x {how} x {size} bytes", tokens * each_token * size, device, "at work")


def _trained(sizes: ModelSizes) -> int:
    """Return the parameters of the policy and of what estimates its values."""
    values = sizes.critic.parameters + sizes.critic.hidden if sizes.critic else sizes.policy.hidden
    return sizes.policy.parameters + values + 1
