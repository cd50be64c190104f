"""torch's `fully_shard` as the learner uses it: layer by layer, for losses that are sums, and models without memory."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.decoder import decoder_layers
from ppo_ray.models.response_lm import ResponseLM

Shards = Mapping[torch.nn.Parameter, torch.Tensor]
"""A rank's shard of each parameter that is on the meta device."""


def shard_models(
    policy: ActorCritic, references: Sequence[ResponseLM], mesh: DeviceMesh, dtype: torch.dtype | None, shards: Shards
) -> None:
    """Shard a policy and its references in place over the ranks of a mesh; arguments as `FullySharded`.

    Raises:
        InputError: a model's layers cannot be found.
    """
    models = [policy, *references]
    held = [{name: shards.get(tensor) for name, tensor in model.named_parameters()} for model in models]
    exact = None if dtype is None else torch.promote_types(dtype, torch.float32)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact, cast_forward_inputs=False)
    for layer in chain.from_iterable(map(decoder_layers, models)):
        fully_shard(layer, mesh=mesh, mp_policy=rounded)
    if policy.value_head is not None:
        fully_shard(policy.value_head, mesh=mesh)
    for model in models:
        fully_shard(model, mesh=mesh, mp_policy=rounded, reshard_after_forward=False)  # `full_kl` needs the heads
    for model, own in zip(models, held, strict=True):
        _fill(model, own)
    for method in ("forward_values", "forward_reference"):
        register_fsdp_forward_method(policy, method)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are shares of one sum, not means of their own
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def cast_fsdp(model: torch.nn.Module) -> FSDPModule:
    """Return a model that was sharded, as the type that `fully_shard` has given it."""
    assert isinstance(model, FSDPModule)
    return model


def find_places(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Return each place of a parameter in a model: its module and its name there. A tied one has several."""
    named = ((module, module.named_parameters(recurse=False, remove_duplicate=False)) for module in model.modules())
    return [(module, name, parameter) for module, own in named for name, parameter in own]


def _fill(model: torch.nn.Module, shards: Mapping[str, torch.Tensor | None]) -> None:
    """Give sharded parameters, by name, their values; FSDP takes them over in its first pass."""
    filled: dict[torch.Tensor, torch.nn.Parameter] = {}
    for name, tensor in model.named_parameters():
        if (shard := shards[name]) is not None:
            assert isinstance(tensor, DTensor)
            mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
            whole = DTensor.from_local(shard, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
            filled[tensor] = torch.nn.Parameter(whole, tensor.requires_grad)
    for module, name, tensor in find_places(model):
        if tensor in filled:
            setattr(module, name, filled[tensor])
