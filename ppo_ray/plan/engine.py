"""Estimates of the memory that an engine holds, and of the keys and values that it has room for."""

from collections.abc import Iterator

from ppo_ray.config import Config, weight_transport
from ppo_ray.plan.adapters import sends_adapters
from ppo_ray.plan.learner import learner_terms
from ppo_ray.plan.memory import (
    BYTES,
    MIB,
    Device,
    Term,
    bucket_term,
    cuda_term,
    parameter_term,
    process_term,
    reward_terms,
)
from ppo_ray.plan.sizes import ModelSizes

_HOST_KV = (64 << 20, 512 << 20)  # bytes; what a CPU's engine has by itself, at least and at most
HOST_BLOCK = 32
"""Tokens of a block of keys and values on a CPU, for vLLM too: its own 128 waste most of a short sequence's block."""
_GPU_SHARE = 0.92  # of a GPU's memory that may be used: the rest is lost between blocks
_ROUNDING = 1e-6


def rollout_terms(config: Config, sizes: ModelSizes, gpu_memory: int | None = None) -> Iterator[Term]:
    """Yield what an engine holds; with tensor parallelism, what each of its ranks holds.

    Args:
        config: of the run.
        sizes: of its models.
        gpu_memory: bytes of a GPU; None: not known.
    """
    yield from _other_terms(config, sizes)
    rollout, policy = config.rollout, sizes.policy
    if rollout.engine == "vllm":
        yield kv_cache_term(config, sizes, gpu_memory)
        return
    device: Device = "gpu" if rollout.gpus else "host"
    tokens, size = (
        rollout.share * (config.prompts.max_tokens + rollout.max_response_tokens),
        BYTES[rollout.engine_dtype],
    )
    kv = tokens * policy.layers * policy.key_values * size
    how = f"{tokens} tokens x {policy.layers} layers x {policy.key_values} x {size} bytes"
    yield Term("KV cache", how, kv, device, "at work")


def _other_terms(config: Config, sizes: ModelSizes) -> Iterator[Term]:
    """Yield what an engine, or each of its ranks, holds beside keys and values."""
    rollout, policy = config.rollout, sizes.policy
    device: Device = "gpu" if rollout.gpus else "host"
    size, ranks = BYTES[rollout.engine_dtype], rollout.tensor_parallel
    yield process_term("rollout" if rollout.engine == "vllm" else "hf", "rollout")
    if device == "gpu":
        yield cuda_term("rollout")
    weights = parameter_term("weights", policy.parameters, size, device, "at work", ranks)
    yield weights
    if device == "gpu" and config.ray.placement == "colocated":
        how = f"{weights.how} x 1.5: torch rounds pinned memory up to powers of two, assumed"
        yield Term("weights of the sleeping engine", how, weights.num_bytes * 3 // 2, "host")
    if (transport := weight_transport(config)) != "object_store":
        yield bucket_term(config, transport)
    alone = sends_adapters(config)
    if alone:
        yield parameter_term("adapters, and those that replace them", 2 * policy.adapters, size, device)
    if rollout.engine == "vllm" and device == "host":
        yield parameter_term("packed copy of the head", policy.vocabulary * policy.hidden, size, "host")
        if not alone:  # all else is packed into the memory of the copies before
            yield parameter_term("embedding that is being replaced", policy.vocabulary * policy.hidden, size, "host")


def kv_cache_term(config: Config, sizes: ModelSizes, gpu_memory: int | None) -> Term:
    """Return the keys and values of a vLLM engine, or of each of its ranks: those asked for, or chosen.

    They are chosen so that no sequence waits for another: on a CPU from 64 to 512 MiB, on a GPU as far as it has room
    beside all else that is on it; at least one sequence has room.

    Args:
        config: of the run.
        sizes: of its models.
        gpu_memory: bytes of a GPU; None: not known, and as much is taken as is needed.
    """
    rollout = config.rollout
    device: Device = "gpu" if rollout.gpus else "host"
    if rollout.kv_cache_mib is not None:
        asked = rollout.kv_cache_mib * MIB
        return Term("KV cache", f"rollout.kv_cache_mib={rollout.kv_cache_mib}", asked, device, "at work")
    tokens, each = _count_tokens(config), kv_bytes(config, sizes)
    needed, how = tokens * each, f"{tokens} tokens of its share of a batch x {each} bytes"
    if device == "host":
        least, most = _HOST_KV
        needed = max(least, min(needed, most), (_round_up(config.max_context) + 2 * HOST_BLOCK) * each)
        how += f", {least >> 20} to {most >> 20} MiB on a CPU"
    elif gpu_memory is not None and (room := _room(config, sizes, gpu_memory)) < needed:
        how = f"what a GPU has room for; {how} would be {needed / (1 << 30):.1f} GiB"
        needed = max(room, config.max_context * each)
    return Term("KV cache", how, -(-needed // MIB) * MIB, device, "at work")


def _room(config: Config, sizes: ModelSizes, gpu_memory: int) -> int:
    """Return the bytes of a GPU that are left for keys and values when an engine is at work.

    Engines that share a GPU keep to their parts of it. A learner rank and reward workers keep to none: what they hold
    is taken off the GPU wherever Ray may put them beside an engine, and then the engine has what is left of both.
    """
    rollout, learner, reward = config.rollout, config.learner, config.reward
    apart, usable = config.ray.placement == "apart", int(gpu_memory * _GPU_SHARE)
    own = sum(term.num_bytes for term in _other_terms(config, sizes) if term.device == "gpu")
    free, num_learners, num_rewards = 1 - min(rollout.gpus, 1.0), 0, 0
    if not apart:  # each learner rank has an engine's rank for itself; reward workers are dealt out over all
        num_rewards = -(-reward.workers // (rollout.workers * rollout.tensor_parallel)) if reward.gpus else 0
        num_learners = 1
    elif rollout.gpus < 1:
        num_learners = int(0 < learner.gpus <= free)
        free -= num_learners * learner.gpus
        num_rewards = min(reward.workers, int(free / reward.gpus + _ROUNDING)) if 0 < reward.gpus < 1 else 0
    # a colocated learner rests meanwhile, and keeps some of it
    learning = [term for term in learner_terms(config, sizes, 0) if apart or term.when == "always"]
    others = num_learners * sum(term.num_bytes for term in learning if term.device == "gpu")
    others += num_rewards * sum(term.num_bytes for term in reward_terms(config, sizes) if term.device == "gpu")
    part = usable if rollout.gpus >= 1 else int(usable * rollout.gpus)
    return min(part, usable - others) - own


def waiting_problem(config: Config, num_cached: int, kv_cache_mib: int) -> str | None:
    """Say by how much an engine's memory for keys and values makes generation wait; None where it does not.

    Args:
        config: of the run.
        num_cached: tokens whose keys and values the engine has room for.
        kv_cache_mib: the memory that they take, MiB.
    """
    longest = config.prompts.max_tokens + config.rollout.max_response_tokens
    at_once = min(config.rollout.num_decoded, config.rollout.share)
    room = num_cached // longest
    if room >= at_once:
        return None
    needed = -(-kv_cache_mib * at_once * longest // num_cached)
    return (
        f"an engine's keys and values have room for {room} of the {at_once} sequences of {longest} tokens that it may "
        f"decode at once: the others wait, and generation may take {at_once / max(room, 1):.1f} times as long; "
        f"rollout.kv_cache_mib={needed} is enough for all"
    )


def _count_tokens(config: Config) -> int:
    """Return the tokens whose keys and values an engine holds at once, at most; blocks are filled in part."""
    rollout, longest = config.rollout, config.prompts.max_tokens + config.rollout.max_response_tokens
    at_once = min(rollout.num_decoded, rollout.share)
    if rollout.gpus:
        return max(config.max_context + 16, at_once * (longest + 16))
    if config.evaluation.num_prompts or config.evaluation.sets:  # which may be more than a batch
        at_once = rollout.num_decoded
    return max(_round_up(config.max_context), at_once * _round_up(longest)) + 2 * HOST_BLOCK  # one is vLLM's own


def _round_up(tokens: int) -> int:
    """Return the tokens of the blocks that a sequence on a CPU takes."""
    return -(-tokens // HOST_BLOCK) * HOST_BLOCK


def kv_bytes(config: Config, sizes: ModelSizes) -> int:
    """Return the bytes of a token's keys and values in all layers of a rank."""
    whole = sizes.policy.layers * sizes.policy.key_values * BYTES[config.rollout.engine_dtype]
    return -(-whole // config.rollout.tensor_parallel)
