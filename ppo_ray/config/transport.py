"""By which way weights travel from the learner to the engines."""

from collections.abc import Iterator
from typing import Literal

from ppo_ray.config.run import Config

Transport = Literal["object_store", "nccl", "ipc"]


def weight_transport(config: Config) -> Transport:
    """Return the transport that `rollout.weight_transport` names, or the fastest that works."""
    asked = config.rollout.weight_transport
    if asked != "auto":
        return asked
    if config.rollout.engine != "vllm" or not (config.rollout.gpus and config.learner.gpus):
        return "object_store"
    if config.colocated:
        return "ipc"
    return "nccl" if _have_whole_gpus(config) else "object_store"


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
    elif asked == "nccl" and (config.colocated or not _have_whole_gpus(config)):
        yield (
            f"rollout.weight_transport=nccl: needs a GPU for every engine and one for the learner, but "
            f"rollout.gpus={rollout.gpus:g} and learner.gpus={learner.gpus:g}; give whole ones, or {remedy}"
        )
    elif asked == "ipc" and _have_whole_gpus(config) and not config.colocated:
        yield (
            f"rollout.weight_transport=ipc: is for engines that share the learner's GPU, but rollout.gpus="
            f"{rollout.gpus:g} and learner.gpus={learner.gpus:g} are whole ones; take nccl, auto or object_store"
        )


def _have_whole_gpus(config: Config) -> bool:
    """Say whether no GPU is shared: actors that ask for a part of one may find themselves on the same."""
    return config.rollout.gpus >= 1 and config.learner.gpus >= 1
