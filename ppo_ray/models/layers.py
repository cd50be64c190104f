"""The decoder layers of a model: what is sharded one by one, and computed again in the backward pass."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ppo_ray.errors import InputError


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of every transformers model in a module, in their order.

    Raises:
        InputError: there are none that transformers knows of.
    """
    layers: list[torch.nn.Module] = []
    for part in model.modules():
        names = getattr(part, "_no_split_modules", None) or ()
        stacks = [child for child in part.children() if isinstance(child, torch.nn.ModuleList)]
        layers += [layer for stack in stacks for layer in stack if type(layer).__name__ in names]
    if not layers:
        raise InputError(
            f"the layers of {type(model).__name__} cannot be told (transformers' _no_split_modules): leave out "
            "learner.sharding=fsdp2 and learner.gradient_checkpointing, or choose another model"
        )
    return layers


def recompute_layers(model: torch.nn.Module) -> None:
    """Keep of every decoder layer its input alone, and compute the rest again in the backward pass.

    transformers' own switch works in training mode alone, which would turn dropout on; this one is torch's, inside of
    each layer's hooks. There is no state of random generators to keep.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
