"""The learner's parameters on its ranks: a full copy on each (`ddp`), or a shard of each (`fsdp2`).

All that differs between the two is here. Under `fsdp2` every forward and backward pass gathers parameters from all
ranks, layer by layer. So all ranks make the same passes at the same time, and call `gather_full` together. Sharded
tensors are torch's DTensors: an elementwise operation on one works on the local shard.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from ppo_ray.learner.fsdp import Shards, cast_fsdp, gather_full, shard_models
from ppo_ray.learner.masters import MasterWeights
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.quantization import named_tensors
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.saving import State

NamedTensors = Iterator[tuple[str, torch.Tensor]]


class Sharding(Protocol):
    """Placement of the parameters on ranks; all ranks make the same calls in the same order."""

    ranks: Ranks
    in_lockstep: bool
    """Whether all ranks must make the same number of passes."""

    def optimized_parameters(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Return what the optimizer steps for those of these parameters that need a gradient."""
        ...

    def before_backward(self, completes: bool) -> None:
        """Prepare a backward pass; after one that `completes`, the sum of all since the last such pass is wanted."""
        ...

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Make each gradient of what `optimized_parameters` returned the sum over all ranks."""
        ...

    def after_step(self) -> None:
        """Update the model after the optimizer has stepped what `optimized_parameters` returned."""
        ...

    def release_gathered(self, backward_follows: bool) -> None:
        """Free the parameters that forward passes gathered; if a backward pass follows, the reference's only."""
        ...

    def weights(self) -> NamedTensors:
        """Yield the policy's full weights by their Hugging Face names, in the dtype it computes in, one at a time.

        Adapters are merged into the weights that they adapt.
        """
        ...

    def parameters(self) -> NamedTensors:
        """Yield the policy's full parameters as they are kept, adapters on their own, one at a time."""
        ...

    def meta_weights(self) -> Iterator[torch.Tensor]:
        """Yield each of `weights` as a tensor on the meta device: shape and dtype. Ranks need not call together."""
        ...

    def state(self) -> State:
        """Return the policy's state in the optimizer's precision, as this rank holds it; a tied tensor is one object.

        Of a policy with adapters it is that of its parameters that are trained.
        """
        ...


class Replicated:
    """Data parallelism: every rank holds the full model; gradients are summed after the backward passes."""

    in_lockstep = False

    def __init__(
        self,
        policy: ActorCritic,
        ranks: Ranks,
        dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        *,
        device: torch.device | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Take a full policy.

        Args:
            policy: its parameters in the precision of the optimizer.
            ranks: the processes that share the update.
            dtype: bfloat16 computes in that, with float32 master weights; any other keeps the parameters as they are.
            reduce_dtype: gradients are summed over the ranks in this, but for the value head's; None: in their own.
            device: where the policy goes; None: where it is.
            offload: takes the master weights, as part of the optimizer's state.
        """
        self.ranks, self._policy, self._reduce_dtype = ranks, policy, reduce_dtype
        self._heads = set(policy.value_head.parameters()) if policy.value_head is not None else set()
        rounded = (parameter for parameter in policy.parameters() if parameter not in self._heads)
        take = partial(offload.put_away, "optimizer") if offload else None
        self._masters = MasterWeights(rounded, dtype, device, take) if dtype == torch.bfloat16 else MasterWeights()
        if device is not None:
            policy.to(device)

    def optimized_parameters(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Return the parameters, or their master weights."""
        return [self._masters.of(parameter) for parameter in parameters if parameter.requires_grad]

    def before_backward(self, completes: bool) -> None:
        """Do nothing: gradients add up on this rank."""

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum over all ranks; a rank that had no part of the mini-batch adds zeros."""
        if self.ranks.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for heads, dtype in ((True, None), (False, self._reduce_dtype)):
            chosen = [parameter for parameter in parameters if (parameter in self._heads) == heads]
            self.ranks.sum((parameter.grad for parameter in chosen if parameter.grad is not None), dtype)

    def after_step(self) -> None:
        """Round the master weights, if there are any, into the model."""
        self._masters.write_back()

    def release_gathered(self, backward_follows: bool) -> None:
        """Do nothing: copies gather nothing."""

    def weights(self) -> NamedTensors:
        """Yield the model's own parameters, or what they make with adapters."""
        return _merge_weights(self._policy) if self._policy.adapted else self._policy.causal_lm.named_parameters()

    def parameters(self) -> NamedTensors:
        """Yield the model's own parameters, and the codes of quantised weights."""
        return named_tensors(self._policy.causal_lm)

    def meta_weights(self) -> Iterator[torch.Tensor]:
        """Yield each of `weights` on the meta device."""
        if self._policy.adapted:
            return (weight for _, weight in _merge_weights(self._policy, _to_meta))
        return (parameter.to("meta") for parameter in self._policy.causal_lm.parameters())

    def state(self) -> State:
        """Return the tensors themselves, or their master weights."""
        return {name: self._masters.of(tensor) for name, tensor in _select_state(self._policy).items()}


class FullySharded:
    """Fully sharded data parallelism: every rank holds a shard of each parameter, gradient and optimizer state.

    Passes gather one layer at a time. Gradients are reduced over the ranks in each backward pass, so no rank holds more
    full gradients than one layer's. Or the last pass of a mini-batch alone reduces them, in one piece for all passes.

    On a mesh of two dimensions ("hybrid sharding") each group of ranks has all shards between them. Its passes gather
    and reduce within the group, and the last one of a mini-batch sums the gradients' shards over the groups.
    """

    in_lockstep = True

    def __init__(
        self,
        policy: ActorCritic,
        reference: ResponseLM,
        ranks: Ranks,
        dtype: torch.dtype | None,
        mesh: DeviceMesh,
        shards: Shards,
        reduces_each: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """Shard policy and reference in place.

        Args:
            policy: its parameters in the precision of the optimizer, full on any device, or on the meta device.
            reference: frozen, in the dtype it computes in, full or on the meta device; or on the policy's parameters.
            ranks: the processes that share the update; each keeps its shards.
            dtype: the policy computes in this. None: each parameter is used in its own, as frozen weights and adapters
                are.
            mesh: the ranks in it hold the shards; see `make_mesh`.
            shards: this rank's, on the mesh's device, of the parameters that are on the meta device; see `FirstReader`.
            reduces_each: whether each backward pass reduces gradients, or only one that completes their sum.
            reduce_dtype: gradients are reduced in this, but for the value head's; None: in float32 or better.

        Raises:
            InputError: a model's layers cannot be found.
        """
        self.ranks, self._policy, self._dtype, self._reduces_each = ranks, policy, dtype, reduces_each
        self._references = [reference] if any(True for _ in reference.parameters()) else []
        self._sums_groups_once = mesh.ndim == 2 and reduce_dtype is None  # rounded sums of passes are not added up
        shard_models(policy, self._references, mesh, dtype, reduce_dtype, shards)

    def optimized_parameters(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Return the parameters' shards."""
        return [parameter for parameter in parameters if parameter.requires_grad]

    def before_backward(self, completes: bool) -> None:
        """Let the backward pass reduce gradients, or keep them whole on this rank until one does."""
        if not self._reduces_each:
            cast_fsdp(self._policy).set_requires_gradient_sync(completes)
        elif self._sums_groups_once:
            cast_fsdp(self._policy).set_requires_all_reduce(completes)

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Do nothing: the backward passes have reduced the gradients."""

    def after_step(self) -> None:
        """Do nothing: the next pass gathers the stepped shards."""

    def release_gathered(self, backward_follows: bool) -> None:
        """Reshard the root modules, which a forward pass leaves gathered for a backward pass."""
        for model in self._references if backward_follows else [self._policy, *self._references]:
            cast_fsdp(model).reshard()

    def weights(self) -> NamedTensors:
        """Gather and yield one weight after the other."""
        return _merge_weights(self._policy) if self._policy.adapted else self.parameters()

    def parameters(self) -> NamedTensors:
        """Gather and yield one parameter after the other, in the dtype that the policy computes in."""
        for name, parameter in self._policy.causal_lm.named_parameters():
            yield name, gather_full(parameter.detach().to(self._dtype or parameter.dtype))

    def meta_weights(self) -> Iterator[torch.Tensor]:
        """Yield each weight on the meta device, in the dtype that the policy computes in."""
        if self._policy.adapted:
            yield from (weight for _, weight in _merge_weights(self._policy, _to_meta))
            return
        for parameter in self._policy.causal_lm.parameters():
            yield torch.empty(parameter.shape, dtype=self._dtype, device="meta")

    def state(self) -> State:
        """Return the shards."""
        return _select_state(self._policy)


def _select_state(policy: ActorCritic) -> dict[str, Any]:
    """Return a policy's state; if it has adapters, that of its parameters that are trained."""
    state = policy.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.requires_grad} if policy.adapted else state


def _merge_weights(policy: ActorCritic, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> NamedTensors:
    """Yield the weights of a policy with its adapters merged into them; `gather_full` makes parameters whole."""
    from ppo_ray.models.lora import merge_weights  # peft, which a policy without adapters does not need

    return merge_weights(policy.causal_lm, gather or gather_full)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
