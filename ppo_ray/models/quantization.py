"""Frozen linear maps in 4 or 8 bits (QLoRA): the codes that are kept of their weights, and what they compute.

W `[out, in]` becomes W_q, which its codes stand for. From then on W_q is the map's weight: in its own passes, in the
reference, and in what engines get. bitsandbytes makes codes of weights, and weights of codes. Its layers are not used.
Those for 4 bits compute a single token by another kernel. Those for 8 bits round the activations too, and so compute
the function of no weights that could be sent. nf4: Dettmers et al. 2023 (arXiv 2305.14314); int8: Dettmers et al. 2022
(arXiv 2208.07339).
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ppo_ray.config import Quantization
from ppo_ray.errors import InputError, first_line

MISSING = "needs bitsandbytes, one of the packages for GPUs (`make setup EXTRA=gpu`), and it cannot be imported"
"""Said where codes are asked for and the library is not there."""
_BLOCK, _SCALE_BLOCK = 64, 256
"""Weights per scale, and scales per scale of scales, of nf4; int8 has a scale per row of W."""


class QuantizedMap(torch.nn.Module):
    """A linear map with codes and scales as its buffers, and no parameter but the bias; `quantize` makes it of one."""

    kind: Quantization
    shape: tuple[int, int]
    """Out and in."""
    dtype: torch.dtype
    """Type that W_q is rounded to."""
    bias: torch.nn.Parameter | None

    @property
    def weight(self) -> torch.Tensor:
        """W_q as the plain map has W: `[out, in]`, or `[in, out]` of a `Conv1D`; made of the codes each time."""
        weight = self.dequantize()
        return weight.T.contiguous() if isinstance(self, Conv1D) else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x W_q^T + b, `[..., out]` of `[..., in]`, with a gradient for x alone."""
        return cast(torch.Tensor, _Product.apply(x, self))

    @torch.no_grad()
    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return codes and scales of W `[out, in]`, on its device.

        Raises:
            InputError: a weight is not finite, or too large for its scale.
        """
        library = _load_library()
        if self.kind == "int8":
            codes, scales, _ = library.int8_vectorwise_quant(weight.half())
            found = {"codes": codes, "scales": scales}
        else:
            codes, state = library.quantize_4bit(weight.float().reshape(-1), blocksize=_BLOCK, quant_type="nf4")
            scales = state.absmax.cpu()  # their mean is that of the host on each machine: a GPU adds in another order
            offset = scales.mean()
            nested, second = library.quantize_blockwise(scales - offset, blocksize=_SCALE_BLOCK)
            found = {"codes": codes, "scales": nested, "scales_of_scales": second.absmax, "mean_scale": offset}
        if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            raise InputError(f"weights of up to {float(weight.abs().max()):.3g} do not fit into {self.kind}")
        return {name: tensor.to(weight.device) for name, tensor in found.items()}

    @torch.no_grad()
    def dequantize(self) -> torch.Tensor:
        """Make W_q `[out, in]` of the codes: in float32, rounded once to `dtype`."""
        library, kept = _load_library(), self._buffers
        if self.kind == "int8":
            weight = library.int8_vectorwise_dequant(kept["codes"], kept["scales"])
        else:
            scales = library.dequantize_blockwise(
                kept["scales"], absmax=kept["scales_of_scales"], blocksize=_SCALE_BLOCK
            )
            state = library.QuantState(
                absmax=scales + kept["mean_scale"],
                shape=torch.Size([self.shape[0] * self.shape[1]]),
                dtype=self.dtype if self.dtype == torch.bfloat16 else torch.float32,
                blocksize=_BLOCK,
                quant_type="nf4",
            )
            weight = library.dequantize_4bit(kept["codes"], state)
        return cast(torch.Tensor, weight.reshape(self.shape).to(self.dtype))


class QuantizedLinear(QuantizedMap, torch.nn.Linear):  # type: ignore[override, misc]
    """`torch.nn.Linear` with codes."""


class QuantizedConv1D(QuantizedMap, Conv1D):
    """GPT-2's linear map, whose W is kept transposed, with codes."""


_QUANTIZED: dict[type, type] = {torch.nn.Linear: QuantizedLinear, Conv1D: QuantizedConv1D}


class _Product(torch.autograd.Function):
    """x W_q^T + b. The backward pass makes W_q anew: W_q of all layers at once would be the whole model."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedMap) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantize(), None


@torch.no_grad()
def quantize(model: Any, kind: Quantization, device: torch.device) -> None:
    """Give a model's linear maps codes instead of weights, in place, and move the model to a device.

    The output embedding stays as it is, and so does a map that shares its weight. The device never holds more than one
    whole weight of those that get codes.

    Args:
        model: of transformers, in float32 or better. Until `set_dtype`, W_q is of this type.
        kind: of the codes.
        device: where they are made.

    Raises:
        InputError: bitsandbytes is missing, or a weight does not fit.
    """
    for name, module in linear_maps(model).items():
        weight = module.weight.data.to(device)
        module.__class__, dtype = _QUANTIZED[type(module)], weight.dtype
        weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        del module._parameters["weight"]
        module.kind, module.shape, module.dtype = kind, tuple(weight.shape), dtype
        try:
            for buffer, tensor in module.encode(weight).items():
                module.register_buffer(buffer, tensor)
        except InputError as error:
            raise InputError(f"the model {model.config.name_or_path!r}: {name}: {error}") from error
    model.to(device)


def linear_maps(model: Any) -> dict[str, Any]:
    """Return the linear maps of a model that `quantize` gives codes, by their names."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in _QUANTIZED and module is not head and owners[id(module.weight)] == 1
    }


@torch.no_grad()
def unquantize(model: Any) -> None:
    """Give a model that `quantize` took plain linear maps again, whose weights are W_q."""
    plain = {quantized: kind for kind, quantized in _QUANTIZED.items()}
    for module in list(model.modules()):
        if isinstance(module, QuantizedMap):
            own = {"weight": torch.nn.Parameter(module.weight, requires_grad=False), "bias": module.bias}
            module.__class__ = plain[type(module)]
            module._buffers.clear()
            module._parameters.clear()
            for name, parameter in own.items():  # in their order
                module.register_parameter(name, parameter)


def set_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let W_q be rounded to a type from now on, which must be that of the tokens' states."""
    for module in model.modules():
        if isinstance(module, QuantizedMap):
            module.dtype = dtype


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a model's function is made of: its parameters, and codes and scales where it has them."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedMap):
            yield from ((f"{name}.{buffer}", tensor) for buffer, tensor in module.named_buffers())


def _load_library() -> Any:
    """Return bitsandbytes' functions.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        from bitsandbytes import functional
    except Exception as error:  # it is missing; or its library does not fit this machine
        raise InputError(f"model.quantization {MISSING}: {first_line(error)}") from error
    return functional
