"""torch's `fully_shard` as the learner uses it: layer by layer, for losses that are sums, and models without memory."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ppo_ray.learner.ranks import Ranks, detect_lost_peers
from ppo_ray.models.actor_critic import ActorCritic
from ppo_ray.models.decoder import decoder_layers
from ppo_ray.models.response_lm import ResponseLM

Shards = Mapping[torch.nn.Parameter, torch.Tensor]
"""A rank's shard of each parameter that is on the meta device."""


def make_mesh(ranks: Ranks, device: torch.device, shard_size: int | None = None) -> DeviceMesh:
    """Make the mesh that models are sharded over; all ranks call this.

    Its last dimension is that of the shards. With fewer ranks than all to a shard group it has a first one, over the
    groups: each group has all of the models ("hybrid sharding").

    Args:
        ranks: that share the update.
        device: of the shards.
        shard_size: ranks of a shard group, by which their number can be divided; None: all.
    """
    if shard_size in (None, ranks.size):
        return init_device_mesh(device.type, (ranks.size,))
    rows = group_by_node(ranks.nodes or ("",) * ranks.size, shard_size)
    own = []
    for groups in (list(zip(*rows, strict=True)), rows):  # the first dimension's, then the second's
        made = {tuple(group): dist.new_group(list(group), timeout=ranks.limit) for group in groups}
        own.append(next(handle for group, handle in made.items() if ranks.rank in group))
    return DeviceMesh.from_group(own, device.type, torch.tensor(rows), mesh_dim_names=("replicate", "shard"))


def group_by_node(nodes: Sequence[str], shard_size: int) -> list[list[int]]:
    """Return the ranks of each shard group, in order: as many groups as can be have all their ranks on one node.

    Args:
        nodes: of each rank.
        shard_size: ranks of each group, by which their number can be divided.
    """
    on_node = {node: [rank for rank, other in enumerate(nodes) if other == node] for node in dict.fromkeys(nodes)}
    whole = {node: len(ranks) // shard_size * shard_size for node, ranks in on_node.items()}
    order = [rank for node, ranks in on_node.items() for rank in ranks[: whole[node]]]
    order += [rank for node, ranks in on_node.items() for rank in ranks[whole[node] :]]
    return sorted(sorted(order[start : start + shard_size]) for start in range(0, len(order), shard_size))


def shard_group(mesh: DeviceMesh) -> tuple[dist.ProcessGroup, list[int]]:
    """Return the process group of this rank's shard group, and its ranks, in the order of their shards."""
    group = mesh.get_group(mesh.ndim - 1)
    return group, dist.get_process_group_ranks(group)


def shard_models(
    policy: ActorCritic,
    references: Sequence[ResponseLM],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    shards: Shards,
) -> None:
    """Shard a policy and its references in place over the ranks of a mesh; arguments as `FullySharded`.

    Raises:
        InputError: a model's layers cannot be found.
    """
    models = [policy, *references]
    held = [{name: shards.get(tensor) for name, tensor in model.named_parameters()} for model in models]
    if reduce_dtype is None and dtype is not None:
        reduce_dtype = torch.promote_types(dtype, torch.float32)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
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


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a full tensor without gradient; a sharded one is gathered from all ranks, which must all call this.

    Raises:
        PeersLost: another rank is gone.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with detect_lost_peers(dist.get_rank()):
        gathered: torch.Tensor = tensor.full_tensor()
        return gathered.detach()


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Copy a full tensor to a parameter's device; only this rank's shard if the parameter is sharded."""
    copy = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return copy
    return distribute_tensor(copy, parameter.device_mesh, parameter.placements, src_data_rank=None)


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
