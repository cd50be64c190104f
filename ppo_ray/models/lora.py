"""LoRA by peft: adapters on a frozen base, and the weights that both make together.

A linear map W `[out, in]` becomes W + scale x B A, with A `[rank, in]` and B `[out, rank]`; scale is alpha / rank. B
begins with zeros, so that new adapters change nothing. Hu et al. 2021 (arXiv 2106.09685).
"""

import contextlib
import copy
import difflib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ppo_ray.config import LoraConfig
from ppo_ray.errors import InputError, first_line
from ppo_ray.models.quantization import QuantizedMap, named_tensors
from ppo_ray.models.tensors import A_NAME, B_NAME, list_names

ADAPTER = "default"
"""peft's name of a model's only adapters."""
_LINEAR = (torch.nn.Linear, Conv1D)
Gather = Callable[[torch.Tensor], torch.Tensor]
"""Returns a full tensor without gradient."""


_BYPASSED = ("deepseek_v4", "jamba", "llama4", "llama4_text", "phimoe", "zamba", "zamba2")
"""Kinds of models that use a linear map's weight without the map, or take more from it than a product."""


def find_target_problem(model: Any, lora: LoraConfig) -> str | None:
    """Say why the targets of new adapters fit a model not, or None.

    Args:
        model: of transformers, on any device, the meta device too.
        lora: the options.
    """
    if (kind := model.config.model_type) in _BYPASSED:
        return f"models of the kind {kind} use linear maps in a way that leaves out adapters; train all weights"
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, _LINEAR)}
    embeddings = {id(model.get_input_embeddings()): "input", id(model.get_output_embeddings()): "output"}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for target in lora.targets or ():
        found = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            near = difflib.get_close_matches(target, ends, n=3, cutoff=0.5) or ends
            return f"{target!r} fits none of the model's modules; there are {', '.join(near)}"
        for name, module in found.items():
            if kind := embeddings.get(id(module)):
                return (
                    f"{target!r} is the model's {kind} embedding, which is used without its module; adapters there "
                    "would not be computed. Leave it out"
                )
            if name not in linear:
                return f"{target!r} is {type(module).__name__}, no linear map; there are {_ends(linear)}"
            if len(tied := owners[id(module.weight)]) > 1:
                return f"{target!r} shares its weight with others ({list_names(tied)}); leave it out"
    return None if linear else "has no linear maps for adapters"


def _ends(modules: dict[str, Any]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in modules}))


def add_adapters(model: Any, config: peft.LoraConfig, seed: int) -> None:
    """Freeze a model and put adapters into its linear maps, in place.

    Args:
        model: of transformers, in eval mode, its weights in the precision of the optimizer: the adapters get it too.
        config: of the adapters; it is left as it is.
        seed: of the first weights of A.

    Raises:
        InputError: peft cannot adapt this model, or would adapt more of it than linear maps.
    """
    model.requires_grad_(False)
    ends = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft sets fan_in_fan_out for GPT-2's maps, and says so
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(copy.deepcopy(config), model, ADAPTER)
    except Exception as error:  # peft's own are ValueError, NotImplementedError and others
        name = model.config.name_or_path or type(model).__name__
        raise InputError(f"peft cannot adapt the model {name!r}: {first_line(error)}") from error
    layers = adapter_layers(model)
    if others := [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), _LINEAR)]:
        # peft takes gate_proj, up_proj, down_proj for those of the experts, which transformers 5 has in one tensor
        near = sorted(end for end in ends if not any(name.endswith(f".{end}") for name in others))
        raise InputError(
            f"peft would put adapters into {list_names(others)}, which are no linear maps, but experts or what chooses "
            f"them. Name model.lora.targets, without the names that experts have; there are {', '.join(near)}"
        )
    for layer in layers.values():
        layer.forward = partial(_forward, layer)
    own = model.peft_config[ADAPTER]
    if not isinstance(own.target_modules, str):
        own.target_modules = sorted(own.target_modules)  # a set has another order in each process
    model.eval()


def _forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Compute what peft's own forward pass of a linear map with adapters does; without dropout, which is refused."""
    outputs: torch.Tensor = layer.get_base_layer()(inputs)
    if layer._disable_adapters:
        return outputs
    a, b, scale = matrices(layer)
    if torch.compiler.is_compiling():  # which chooses itself what is kept
        return outputs + ((inputs.to(a.dtype) @ a.T) @ (b.T * scale)).to(outputs.dtype)
    return _AddAdapters.apply(outputs, inputs, a, b, scale)


class _AddAdapters(torch.autograd.Function):
    """W x + scale x B A x, added to W x in place.

    peft makes three tensors as large as W x beside it, and keeps a copy of x in the type of the adapters for each map
    that reads x. Here x is kept as it is, which maps of the same input share.
    """

    @staticmethod
    def forward(
        ctx: Any, outputs: torch.Tensor, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        low = inputs.flatten(0, -2).to(a.dtype) @ a.T
        flat = outputs.view(-1, len(b))
        if outputs.dtype == b.dtype:
            flat.addmm_(low, b.T, alpha=scale)
        else:
            flat += low @ (b.T * scale)  # rounded once
        ctx.save_for_backward(inputs, a, b, low)
        ctx.scale = scale
        ctx.mark_dirty(outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, a, b, low = ctx.saved_tensors
        exact = grad.flatten(0, -2).to(b.dtype)
        grad_low = (exact @ b).mul_(ctx.scale)
        grad_inputs = (grad_low @ a).to(inputs.dtype).view_as(inputs) if ctx.needs_input_grad[1] else None
        return (
            grad,
            grad_inputs,
            grad_low.T @ inputs.flatten(0, -2).to(a.dtype),
            (exact.T @ low).mul_(ctx.scale),
            None,
        )


def adapter_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Return the linear maps that have adapters, layers of peft, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def matrices(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter, float]:
    """Return A, B and the scale of a layer's adapters."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute without its adapters for the length of a block.

    peft's own switch would also take the gradient from the adapters, of which a graph may be waiting.
    """
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def base_weights(model: torch.nn.Module, gather: Gather = torch.Tensor.detach) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model without its adapters, by the names that it had before it got them.

    Of a quantised linear map they are codes and scales.
    """
    for name, tensor in named_tensors(model):
        if not is_adapter(name):
            yield name.replace(".base_layer.", "."), gather(tensor)


def merge_weights(model: torch.nn.Module, gather: Gather = torch.Tensor.detach) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield W + scale x B A of each linear map with adapters, and every other tensor as it is, one at a time.

    The sum is in float32 or better and rounded once, to the type of W. W of a quantised map is what its codes stand
    for. A model without adapters yields its parameters.

    Args:
        model: with or without adapters.
        gather: makes a parameter whole; all ranks call it together.
    """
    layers = {id(layer.get_base_layer()): layer for layer in adapter_layers(model).values()}
    for name, owner in _base_weights(model):
        weight = gather(getattr(owner, name.rpartition(".")[2]))
        if (layer := layers.get(id(owner))) and name.endswith(".weight"):
            a, b, scale = matrices(layer)
            weight = merge(weight, gather(a), gather(b), scale, bool(getattr(layer, "fan_in_fan_out", False)))
        yield name, weight
        del weight  # before the next is made


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return A and B of each linear map with adapters, by the names that they travel by.

    A name is the map's, with `.lora_A.weight` or `.lora_B.weight` behind it.
    """
    found = {}
    for name, layer in adapter_layers(model).items():
        found[f"{name}{A_NAME}"], found[f"{name}{B_NAME}"], _ = matrices(layer)
    return found


def scale_adapters(model: torch.nn.Module, gather: Gather = torch.Tensor.detach) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield A and scale x B of each linear map with adapters, one at a time: what an engine adds to its frozen weights.

    Args:
        model: with adapters.
        gather: makes a parameter whole; all ranks call it together.
    """
    for name, layer in adapter_layers(model).items():
        a, b, scale = matrices(layer)
        yield f"{name}{A_NAME}", gather(a)
        yield f"{name}{B_NAME}", gather(b) * scale


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> torch.Tensor:
    """Compute W + scale x B A in float32 or better, rounded once to the type of W.

    Args:
        weight: `[out, in]`, or `[in, out]` if transposed.
        a: `[rank, in]`.
        b: `[out, rank]`.
        scale: alpha / rank.
        transposed: whether the layer keeps W transposed, as GPT-2's do.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    first, second = (a.T, b.T) if transposed else (b, a)
    return torch.addmm(exact, first.to(exact.dtype), second.to(exact.dtype), alpha=scale).to(weight.dtype)


@torch.no_grad()
def merge_in_place(model: torch.nn.Module) -> None:
    """Make a model with adapters one without, of the same function."""
    for name, layer in adapter_layers(model).items():
        base, (a, b, scale) = layer.get_base_layer(), matrices(layer)
        base.weight.copy_(merge(base.weight, a, b, scale, bool(getattr(layer, "fan_in_fan_out", False))))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    del model.peft_config


def _base_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield each weight's name before the model got adapters, and the module whose attribute it is, in their order."""
    seen: set[torch.nn.Parameter] = set()
    for prefix, module in model.named_modules():
        own = {name: weight for name, weight in module.named_parameters(recurse=False) if weight not in seen}
        seen.update(own.values())  # a tied head is named once
        for name in ["weight", *own] if isinstance(module, QuantizedMap) else own:
            path = f"{prefix}.{name}".removeprefix(".")
            if not is_adapter(path):
                yield path.replace(".base_layer.", "."), module


def is_adapter(name: str) -> bool:
    """Say whether a parameter's name is that of an adapter's."""
    return ".lora_A." in name or ".lora_B." in name
