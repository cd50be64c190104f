"""The same layers in fewer kernels: compiled by `torch.compile`, or with norms that are one kernel each.

A transformers layer runs some dozens of small operations one after another. On a GPU each reads and writes memory anew,
and many keep what they read for the backward pass.

Dimensions: H hidden units.
"""

import inspect
import os
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from platformdirs import user_cache_path
from torch._dynamo.utils import calculate_time_spent, counters
from torch.func import functional_call

from ppo_ray.models.decoder import decoder_layers

_VARIANTS = 48
"""Compiled forms of one piece of a layer, at most. Passes with and without gradient, of policy, critic and reference,
with one row and with several, have one each. Whatever comes after that many runs as it is."""
_EXACT = {"emulate_precision_casts": True}
"""torch's options: bfloat16 is rounded where the layers round it. Otherwise passes with and without gradient, compiled
in different pieces, would differ: the ratio of a policy to itself would not be 1."""
_compile = partial(torch.compile, dynamic=True, options=_EXACT, recompile_limit=_VARIANTS)


def compile_layers(model: torch.nn.Module) -> None:
    """Let torch compile every decoder layer in place, at its first pass, for rows of any number and length.

    Attention that is told bounds stays outside, and runs as it is: `models/attention.py`. What FSDP or gradient
    checkpointing put around a layer later stays outside too. Names of parameters do not change.

    Args:
        model: a module with transformers models, in eval mode, on any device.

    Raises:
        InputError: the layers cannot be told.
    """
    torch._inductor.config.compile_threads = 1  # else: processes beside this one, whose memory nobody has planned
    # what is compiled is kept and loaded again: not in /tmp, where others could lay code for us
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache_path("ppo-ray") / "inductor"))
    for layer in decoder_layers(model):
        layer.forward = _compile(layer.forward)


def measure_compilation() -> dict[str, float]:
    """Return how much torch has compiled in this process so far: pieces of layers, and seconds; {}: nothing."""
    if not (number := counters["stats"]["unique_graphs"]):
        return {}
    seconds = calculate_time_spent()["total_wall_time"]
    return {"learner/compiled_pieces": float(number), "learner/compile_s": seconds}


def fuse_norms(model: torch.nn.Module, device: torch.device) -> int:
    """Compute each RMSNorm that is Llama's by torch's one kernel, in place; returns how many there are.

    transformers' own is eight kernels, and keeps the states in float32 for the backward pass. Norms that are another
    function, or round in another order, are left alone. Each kind is tried, forwards and backwards.

    Args:
        model: a module with transformers models, on any device, the meta device too.
        device: that it will compute on.
    """
    tried: dict[tuple[type, int, float], bool] = {}
    number = 0
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        own = dict(module.named_parameters())
        takes_states = len(inspect.signature(module.forward).parameters) == 1
        if not (isinstance(eps, float) and takes_states and own.keys() == {"weight"} and own["weight"].ndim == 1):
            continue
        kind = (type(module), len(own["weight"]), eps)
        if kind not in tried:
            tried[kind] = all(_is_same(module, eps, device, dtype) for dtype in (torch.float32, torch.bfloat16))
        if tried[kind]:
            module.forward = partial(_forward, module, eps)
            number += 1
    return number


def _forward(module: Any, eps: float, states: torch.Tensor) -> torch.Tensor:
    return _norm(module.weight, eps, states)


def _norm(weight: torch.Tensor, eps: float, states: torch.Tensor) -> torch.Tensor:
    """Compute weight x states / rms(states), `[..., H]`, rounded before the product as Llama's is."""
    return weight * torch.nn.functional.rms_norm(states, states.shape[-1:], None, eps)


def _is_same(module: Any, eps: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a norm is `_norm`, with its gradients, on states of three sizes, the smallest near eps."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(3, 8, len(module.weight), generator=generator, device=device)
    weight = torch.randn(len(module.weight), generator=generator, device=device).to(dtype).requires_grad_()
    scales = torch.tensor([eps**0.5, 1.0, 30.0], device=device)[:, None, None]
    states, grad = (drawn * scales).to(dtype).requires_grad_(), drawn.flip(0).to(dtype)
    try:
        both = functional_call(module, {"weight": weight}, (states,)), _norm(weight, eps, states)
        its, mine = ((normed.detach(), *torch.autograd.grad(normed, (states, weight), grad)) for normed in both)
    except (RuntimeError, TypeError, ValueError):
        return False
    # rounding in another place moves every second number of 16 bits by half a unit: 1e-3 on average
    close = 1e-6 if dtype == torch.float32 else 2e-4
    pairs = [(one.float(), other.float()) for one, other in zip(its, mine, strict=True)]
    return both[0].dtype == both[1].dtype and all(
        bool((one - other).abs().mean() <= close * one.abs().mean()) for one, other in pairs
    )
