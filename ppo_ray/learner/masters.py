"""Master weights: what the optimizer steps where a model computes in less precision than float32."""

from collections.abc import Callable, Iterable

import torch

from ppo_ray.models.loading import cast


class MasterWeights:
    """Float32 copies, which the optimizer steps, of parameters that a model computes with in bfloat16.

    bfloat16 has 8 bits of precision. A step below 0.2 % of a weight would be lost, and with it most of what PPO learns.
    So gradients are added up in float32, the optimizer steps the float32 masters, and the model gets them rounded. A
    parameter without a master is its own.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter] = (),
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        take: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Keep the parameters' values as masters, and round the parameters.

        Args:
            parameters: in float32; they are of `dtype` afterwards.
            dtype: that the model computes in.
            device: where copies of both go, one after another; None: where they are.
            take: is given each master as soon as it is made.
        """
        self._masters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for parameter in parameters:
            own = parameter.detach() if device is None else parameter.detach().to(device, copy=True)
            master = torch.nn.Parameter(own, parameter.requires_grad)
            self._masters[parameter] = master
            cast(parameter, dtype)
            parameter.data = parameter.data.to(master.device)
            if take is not None:
                take(master)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def of(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """Return a parameter's master, or the parameter itself if it has none."""
        return self._masters.get(parameter, parameter)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def _take_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Add a micro-batch's gradient to the master's, in float32; the backward pass calls this."""
        master, gradient = self._masters[parameter], parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient
        parameter.grad = None
