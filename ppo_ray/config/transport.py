"""By which way weights travel from the learner to the engines."""

from collections.abc import Iterator
from typing import Literal

from ppo_ray.config.run import Config

Transport = Literal["object_store", "nccl", "ipc"]


def weight_transport(config: Config, colocated: bool = False) -> Transport:
    """Return the transport that `rollout.weight_transport` names, or the fastest that works.

    Args:
        config: of the run.
        colocated: whether every engine shares its GPU with a learner rank.
    """
    asked = config.rollout.weight_transport
    if asked != "auto":
        return asked
    if config.rollout.engine != "vllm" or not (config.rollout.gpus and config.learner.gpus):
        return "object_store"
    if colocated:
        return "ipc"
    # Actors that ask for a part of a GPU may find themselves on the same one, which NCCL refuses.
    return "nccl" if config.rollout.gpus >= 1 and config.learner.gpus >= 1 else "object_store"


def transport_problems(config: Config) -> Iterator[str]:
    """Yield why the transport that was asked for cannot work."""
    rollout, learner = config.rollout, config.learner
    asked = rollout.weight_transport
    if asked in ("auto", "object_store"):
        return
    remedy = "take auto or object_store"
    if rollout.engine != "vllm":
        yield f"rollout.weight_transport={asked}: is vLLM's, but rollout.engine={rollout.engine}; {remedy}"
    elif not (rollout.gpus and learner.gpus):
        yield (
            f"rollout.weight_transport={asked}: goes from GPU to GPU, but rollout.gpus={rollout.gpus:g} and "
            f"learner.gpus={learner.gpus:g}; {remedy}, or give both GPUs"
        )
    elif asked == "nccl" and not (rollout.gpus >= 1 and learner.gpus >= 1):
        yield (
            f"rollout.weight_transport=nccl: needs a GPU for every engine and one for the learner, but "
            f"rollout.gpus={rollout.gpus:g} and learner.gpus={learner.gpus:g}; give whole ones, or {remedy}"
        )
    elif asked == "ipc" and rollout.gpus >= 1 and learner.gpus >= 1:
        yield (
            f"rollout.weight_transport=ipc: is for engines that share the learner's GPU, but rollout.gpus="
            f"{rollout.gpus:g} and learner.gpus={learner.gpus:g} are whole ones; take nccl, auto or object_store"
        )
