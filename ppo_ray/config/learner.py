"""The learner's options, and what they do not go with."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ppo_ray.config.file import Contradiction
from ppo_ray.config.sections import DType, ModelConfig, Section

Offloaded = Literal["optimizer", "reference"]


class LearnerConfig(Section):
    """Where the update runs."""

    workers: int = Field(default=1, ge=1)
    """Number of learner ranks, which share every batch by tokens. The update is the same, up to the rounding of
    sums."""
    threads: int = Field(default=2, ge=1)
    """CPU threads per rank. workers x threads must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per rank; a fraction lets a single rank share one."""
    microbatch_tokens: int = Field(default=1024, ge=1)
    """Maximum number of prompt and response tokens per forward pass, padding included. Lower it if memory runs out: the
    gradient does not change. If an update's only mini-batch fits into one pass, a forward pass is saved."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """Distribution of policy, critic, reference, gradients and optimizer over the ranks. ddp: each rank holds all of
    it. fsdp2: each holds a share, and a layer is gathered when it is at work; with one rank there is nothing to share.
    docs/gpus.md has the bytes."""
    shard_size: int | None = Field(default=None, ge=2)
    """Number of ranks that share one copy under fsdp2, best as many as a node has; null: all ranks. Each group of so
    many ranks has a copy (HSDP), and only gradients travel between groups. It must divide workers. verl: `fsdp_size`;
    torchtitan: `data_parallel_shard_degree`."""
    reduce_gradients: Literal["microbatch", "minibatch"] = "microbatch"
    """When fsdp2 sums gradients over the ranks: in every backward pass, or in a mini-batch's last: less traffic, and
    until then each rank holds 4 bytes more per trained parameter. ddp always sums once per mini-batch."""
    reduce_dtype: DType = "float32"
    """Precision in which gradients travel between ranks, and are summed. bfloat16 halves the traffic, and is not exact:
    each sum of two keeps 8 bits, so the update is no longer that of one rank. The value head's stay float32."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes each layer's activations again instead of keeping them: a third more work,
    less memory."""
    compile: bool = False
    """Whether torch.compile turns each layer into fewer and faster kernels. Compiling takes a minute or more at the
    start, and again when rows of a new kind come. Results are the same up to the rounding of sums; a trial at the start
    compares them with those of the layers as they are."""
    offload: Annotated[tuple[Offloaded, ...], Field(strict=False)] = ()
    """What lies in the host's memory while nobody needs it, e.g. [optimizer, reference], so that an engine on the same
    GPU has room. optimizer: Adam's moments, and under ddp the float32 master weights of bfloat16 ones: on the GPU in an
    update's epochs alone. reference: on the GPU before them alone. Weights stay the same bit for bit; each update
    copies all of it there and back."""


def learner_contradictions(learner: LearnerConfig, model: ModelConfig) -> Iterator[Contradiction]:
    """Yield what the learner's options do not go with."""
    workers, size = learner.workers, learner.shard_size
    if learner.reduce_gradients == "minibatch" and learner.sharding == "ddp":
        text = "minibatch is for learner.sharding=fsdp2; ddp always sums once per mini-batch: leave it out"
        yield Contradiction(("learner.reduce_gradients", "learner.sharding"), text)
    if size is not None and learner.sharding == "ddp":
        text = f"{size} is for learner.sharding=fsdp2; under ddp each rank has a copy of its own: leave it out"
        yield Contradiction(("learner.shard_size", "learner.sharding"), text)
    elif size is not None and workers % size:
        text = f"{size} does not divide learner.workers={workers}: each group of as many ranks holds one copy"
        yield Contradiction(("learner.shard_size", "learner.workers"), text)
    if learner.reduce_dtype != "float32" and workers == 1:
        text = f"{learner.reduce_dtype} is for gradients that travel between ranks, and learner.workers=1: leave it out"
        yield Contradiction(("learner.reduce_dtype", "learner.workers"), text)
    if learner.reduce_dtype != "float32" and learner.reduce_gradients == "minibatch":
        text = (
            f"with minibatch the gradients of all passes would be added up in {learner.reduce_dtype} too; take "
            "learner.reduce_gradients=microbatch, which adds them up in float32"
        )
        yield Contradiction(("learner.reduce_dtype", "learner.reduce_gradients"), text)
    if learner.offload and not learner.gpus:
        text = f"{', '.join(learner.offload)}: on CPUs all of it is in the host's memory already: leave it out"
        yield Contradiction(("learner.offload", "learner.gpus"), text)
    if "reference" in learner.offload and model.lora is not None and model.reference_path is None:
        text = "reference: with adapters the reference is the policy without them, which stays: leave it out"
        yield Contradiction(("learner.offload", "model.lora"), text)


def lora_contradictions(model: ModelConfig, learner: LearnerConfig, adapter_sync: str) -> Iterator[Contradiction]:
    """Yield what adapters do not go with, and what a quantised base does not."""
    lora = model.lora
    if lora is None and adapter_sync == "adapter":
        yield Contradiction(
            ("rollout.adapter_sync", "model.lora"),
            "adapter sends adapters alone, and without model.lora there are none; set model.lora, or auto",
        )
    names = ("rank", "alpha", "targets")
    if lora and lora.path and (given := [f"model.lora.{name}" for name in names if getattr(lora, name) is not None]):
        yield Contradiction(
            (*given, "model.lora.path"),
            "is for new adapters, and those at model.lora.path have their own; leave it out",
        )
    shares = learner.sharding == "fsdp2" and learner.workers > 1
    why = {
        "model.lora": lora is None and "codes cannot be trained, adapters beside them can: set model.lora",
        "learner.gpus": not learner.gpus and "quantised weights are for GPUs, and learner.gpus=0 has none; set 1",
        "learner.sharding": shares
        and "fsdp2 shares no codes among ranks; set learner.sharding=ddp: each rank has them all",
        "learner.compile": learner.compile
        and "layers with quantised weights are not compiled; leave out learner.compile",
        "rollout.adapter_sync": adapter_sync == "adapter"
        and "engines would add the adapters to weights that are not quantised, another policy; set "
        "rollout.adapter_sync=merged, or auto",
    }
    for key, reason in why.items() if model.quantization else ():
        if reason:
            yield Contradiction(("model.quantization", key), f"{model.quantization}: {reason}")
