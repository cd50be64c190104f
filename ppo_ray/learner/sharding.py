"""How the learner's parameters lie on its ranks: a copy on each (`ddp`), or a share of each (`fsdp2`).

What differs between the two is here, and nowhere else. Under `fsdp2` every forward and backward pass gathers parameters
from all ranks, layer by layer, so all ranks make the same passes at the same time; so they do where a whole tensor is
wanted. Tensors that are shared are torch's DTensors: what is done to each element is done to each share.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ppo_ray.learner.ranks import Ranks, peers_needed
from ppo_ray.models.actor_critic import ActorCritic, State
from ppo_ray.models.decoder import decoder_layers
from ppo_ray.models.loading import cast
from ppo_ray.models.response_lm import ResponseLM


class MasterWeights:
    """The masters of some parameters; a parameter without one is its own."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter] = (), dtype: torch.dtype = torch.bfloat16) -> None:
        """Keep the parameters as they are as masters, and give the model rounded ones.

        Args:
            parameters: in float32; they are of `dtype` afterwards.
            dtype: that the model computes in.
        """
        self._masters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for parameter in parameters:
            self._masters[parameter] = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
            cast(parameter, dtype)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def of(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """Return a parameter's master."""
        return self._masters.get(parameter, parameter)

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model its parameters anew, after the masters were stepped."""
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def _take_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Add a micro-batch's gradient to the master's, in float32; called by the backward pass, as each is ready."""
        master, gradient = self._masters[parameter], parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient
        parameter.grad = None


NamedTensors = Iterator[tuple[str, torch.Tensor]]


class Sharding(Protocol):
    """What the learner asks; all ranks make the same calls in the same order."""

    ranks: Ranks
    in_lockstep: bool
    """Whether all ranks must make the same number of passes."""

    def trained(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Return what the optimizer steps for these parameters, as far as they are trained."""
        ...

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Make each gradient of what `trained` returned the sum over all ranks."""
        ...

    def stepped(self) -> None:
        """Let the model have what the optimizer has stepped."""
        ...

    def evaluated(self, backward_follows: bool) -> None:
        """Let go of what forward passes have gathered, of the reference alone if the policy's are gone back through."""
        ...

    def weights(self) -> NamedTensors:
        """Yield the policy's weights, whole, by their Hugging Face names, in the type it computes in, one at a time."""
        ...

    def outlines(self) -> Iterator[torch.Tensor]:
        """Yield the shape and type of each of `weights`, as a tensor without memory; each rank by itself."""
        ...

    def state(self) -> State:
        """Return all that a policy holds, whole, as the optimizer has it, in host memory; to the first rank alone."""
        ...


class Copies:
    """Every rank holds all of the model; gradients are added up after the backward passes."""

    in_lockstep = False

    def __init__(self, policy: ActorCritic, ranks: Ranks, dtype: torch.dtype | None = None) -> None:
        """Take a policy that is whole.

        Args:
            policy: its parameters as the optimizer shall have them.
            ranks: the processes that share the update.
            dtype: bfloat16: compute in that, with float32 masters; else as the parameters are.
        """
        self.ranks, self._policy = ranks, policy
        heads = set(policy.value_head.parameters())
        rounded = (parameter for parameter in policy.parameters() if parameter not in heads)
        self._masters = MasterWeights(rounded, dtype) if dtype == torch.bfloat16 else MasterWeights()

    def trained(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Return the parameters or their masters."""
        return [self._masters.of(parameter) for parameter in parameters if parameter.requires_grad]

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum over all ranks; one that had no part of the mini-batch adds nothing."""
        if self.ranks.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.sum(parameter.grad for parameter in parameters if parameter.grad is not None)

    def stepped(self) -> None:
        """Round the masters, if there are any, into the model."""
        self._masters.write_back()

    def evaluated(self, backward_follows: bool) -> None:
        """Nothing was gathered."""

    def weights(self) -> NamedTensors:
        """Yield the model's own parameters."""
        return self._policy.causal_lm.named_parameters()

    def outlines(self) -> Iterator[torch.Tensor]:
        """Yield the outline of each of the model's own parameters."""
        return (parameter.to("meta") for parameter in self._policy.causal_lm.parameters())

    def state(self) -> State:
        """Return the tensors themselves, masters where there are any."""
        state = self._policy.state_dict(keep_vars=True) if self.ranks.leads else {}
        return {name: self._masters.of(tensor).detach() for name, tensor in state.items()}


class Shares:
    """Every rank holds a share of each parameter, its gradient and its optimizer state; layers are gathered in passes.

    Gradients are added up over the ranks in each backward pass, so that no rank ever holds more of them than a layer's:
    with few micro-batches that costs nothing, with many it is the price of the memory.
    """

    in_lockstep = True

    def __init__(
        self, policy: ActorCritic, reference: ResponseLM, ranks: Ranks, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Cut policy and reference into shares, in place.

        Args:
            policy: whole, wherever it was loaded; its parameters as the optimizer shall have them.
            reference: whole and frozen, in the type it computes in.
            ranks: the processes that share the update; each takes its share.
            dtype: that the policy computes in; gradients are added up in float32 or better.
            device: where the shares go, layer by layer.

        Raises:
            InputError: the layers of a model cannot be told.
        """
        self.ranks, self._policy, self._reference, self._dtype = ranks, policy, reference, dtype
        mesh = init_device_mesh(device.type, (ranks.size,))
        exact = torch.promote_types(dtype, torch.float32)
        rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact, cast_forward_inputs=False)
        for layer in chain(decoder_layers(policy), decoder_layers(reference)):
            fully_shard(layer, mesh=mesh, mp_policy=rounded)
        fully_shard(policy.value_head, mesh=mesh)
        for model in (policy, reference):
            fully_shard(model, mesh=mesh, mp_policy=rounded, reshard_after_forward=False)  # `full_kl` needs the heads
        register_fsdp_forward_method(policy, "forward_values")
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are shares of one sum, not means of their own
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def trained(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Return the parameters' shares."""
        return [parameter for parameter in parameters if parameter.requires_grad]

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """The backward passes have."""

    def stepped(self) -> None:
        """The next pass gathers what was stepped."""

    def evaluated(self, backward_follows: bool) -> None:
        """Free what stays gathered for a backward pass that does not come."""
        for model in (self._reference,) if backward_follows else (self._policy, self._reference):
            assert isinstance(model, FSDPModule)
            model.reshard()

    def weights(self) -> NamedTensors:
        """Gather one parameter after the other."""
        for name, parameter in self._policy.causal_lm.named_parameters():
            yield name, whole(parameter.detach().to(self._dtype))

    def outlines(self) -> Iterator[torch.Tensor]:
        """Yield the outline of each parameter, in the type that the policy computes in."""
        for parameter in self._policy.causal_lm.parameters():
            yield torch.empty(parameter.shape, dtype=self._dtype, device="meta")

    def state(self) -> State:
        """Gather one tensor after the other."""
        found: dict[torch.Tensor, torch.Tensor] = {}  # a tied head is gathered once
        state = self._policy.state_dict(keep_vars=True)
        for tensor in state.values():
            if tensor not in found:
                gathered = whole(tensor)
                found[tensor] = gathered.cpu() if self.ranks.leads else gathered.new_empty(0)
        return {name: found[tensor] for name, tensor in state.items()} if self.ranks.leads else {}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole, without gradient: gathered from all ranks, each of which must ask, if it is shared.

    Raises:
        PeersLost: another rank is gone.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with peers_needed(dist.get_rank()):
        gathered: torch.Tensor = tensor.full_tensor()
        return gathered.detach()


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Copy a whole tensor to where a parameter of its shape is; this rank's share of it, if that is shared."""
    copy = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return copy
    return distribute_tensor(copy, parameter.device_mesh, parameter.placements, src_data_rank=None)
