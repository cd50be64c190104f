"""The choice of the way that weights travel from the learner to the engines."""

from collections.abc import Iterator

from ppo_ray.config.run import Config
from ppo_ray.config.sections import Transport


def weight_transport(config: Config) -> Transport:
    """Return the transport that `rollout.weight_transport` names; for auto, the fastest that works."""
    asked = config.rollout.weight_transport
    if asked != "auto":
        return asked
    if config.rollout.engine != "vllm" or not (config.rollout.gpus and config.learner.gpus):
        return "object_store"
    if config.colocated:
        return "ipc"
    return "nccl" if _are_apart(config) else "object_store"


def transport_problems(config: Config) -> Iterator[str]:
    """Yield the reasons why the transport that was asked for cannot work."""
    rollout, learner = config.rollout, config.learner
    asked = rollout.weight_transport
    if asked in ("auto", "object_store"):
        return
    remedy = "take auto or object_store"
    gpus = f"rollout.gpus={rollout.gpus:g} and learner.gpus={learner.gpus:g}"
    if rollout.engine != "vllm":
        yield f"rollout.weight_transport={asked}: is vLLM's, but rollout.engine={rollout.engine}; {remedy}"
    elif not (rollout.gpus and learner.gpus):
        yield f"rollout.weight_transport={asked}: goes from GPU to GPU, but {gpus}; {remedy}, or give both GPUs"
    elif asked == "nccl" and not _are_apart(config):
        yield (
            f"rollout.weight_transport=nccl: needs GPUs that engines and learner do not share, but {gpus} with "
            f"ray.placement={config.ray.placement}; give whole ones apart, or {remedy}"
        )
    elif asked == "ipc" and not config.colocated:
        ranks = rollout.workers * rollout.tensor_parallel
        yield (
            "rollout.weight_transport=ipc: needs a learner rank on every engine's GPU: set ray.placement=colocated and "
            f"learner.workers to rollout.workers x rollout.tensor_parallel = {ranks}, or {remedy}"
        )


def _are_apart(config: Config) -> bool:
    """Say whether engines and learner share no GPU: actors that ask for a part of one may be put on the same one."""
    whole = config.rollout.gpus >= 1 and config.learner.gpus >= 1
    return whole and config.ray.placement == "apart"
