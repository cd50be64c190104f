"""Float32 copies of parameters that a model computes with in bfloat16: what the optimizer steps.

bfloat16 has 8 bits of precision: a step below 0.2 % of a weight would be lost, and with it most of what PPO learns. So
gradients are added up in float32, the optimizer steps the float32 masters, and the model's own parameters are these,
rounded.
"""

from collections.abc import Iterable

import torch

from ppo_ray.models.actor_critic import cast


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
