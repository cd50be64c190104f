"""How weights travel: in which precision, in pieces of which size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # see `checksums`
    import torch

NUM_BUFFERS = 2
"""Buffers of an NCCL broadcast: one is filled while the other is on its way."""


@dataclass(frozen=True)
class Wire:
    """What a transport makes of the learner's tensors before they leave."""

    dtype: str | None = None
    """torch's name of the dtype that floating-point tensors are rounded to; None: as they are."""
    bucket_bytes: int = 256 << 20
    """Largest buffer; a tensor that is larger has one of its own."""

    def dtype_of(self, tensor: "torch.Tensor") -> "torch.dtype":
        """Return the dtype that a tensor arrives in."""
        import torch

        return tensor.dtype if self.dtype is None or not tensor.is_floating_point() else getattr(torch, self.dtype)

    def num_bytes(self, tensor: "torch.Tensor") -> int:
        """Return the size that a tensor arrives with."""
        return tensor.numel() * self.dtype_of(tensor).itemsize

    def rounded(self, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield what arrives of each tensor, one at a time: itself, or a copy in the wire's dtype."""
        for name, tensor in named_tensors:
            tensor = tensor.detach().to(self.dtype_of(tensor))
            yield name, tensor
            del tensor  # before the next is made
