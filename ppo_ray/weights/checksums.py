"""Checksums of tensors: XXH3 of their bytes on a host, sums of their words on a GPU.

A GPU's bytes would have to come to the host for XXH3; sums of integers are made where the tensor lies, at the speed of
its memory, and are the same in any order, on any device. Either finds every change of one word: a tensor that is stale,
torn, cut short, or at another's place.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import xxhash

if TYPE_CHECKING:  # whoever only names weights, or passes them on, need not load it
    import torch

Method = Literal["xxh3", "sums"]

_WORDS = {1: "uint8", 2: "int16", 4: "int32", 8: "int32"}  # of 64 bits, times a place, the upper ones would be lost
_PIECE = 1 << 22  # words at a time: the sums need 64 MB beside the tensor


def byte_checksum(tensor: "torch.Tensor") -> str:
    """Return XXH3-64 of a tensor's bytes, hexadecimal; a tensor that is not on the host is copied there."""
    return str(xxhash.xxh3_64_hexdigest(_bytes(tensor)))


def word_sums(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return sum(w_i) and sum((i + 1) w_i) modulo 2^64 of a tensor's elements, their bits read as integers.

    Elements of eight bytes are two words. The first sum finds any change of one word, both together any of two, and so
    two elements of up to four bytes that changed places.

    Returns:
        `[2]` int64 on the tensor's device; nothing waits for it.
    """
    import torch

    words = tensor.detach().contiguous().reshape(-1)
    words = words.view(getattr(torch, _WORDS[words.element_size()]))
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _PIECE):
        piece = words[start : start + _PIECE].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=tensor.device)
        sums[0] += piece.sum()
        sums[1] += (piece * places).sum()
    return sums


def format_sums(sums: "list[torch.Tensor]") -> list[str]:
    """Format sums of `word_sums` as hexadecimal numbers; waits for the device once."""
    import torch

    pairs = torch.stack(sums).tolist() if sums else []
    return ["".join(f"{value % (1 << 64):016x}" for value in pair) for pair in pairs]


def weights_checksum(named_tensors: Iterable[tuple[str, "torch.Tensor"]], wanted: bool = True) -> str:
    """Return XXH3-64 of all tensors' bytes, each padded to 64, hexadecimal: a checkpoint's checksum of its weights.

    Args:
        named_tensors: may be made as they are asked for, by all ranks together.
        wanted: false on a rank that only helps to make them; it gets an empty text.
    """
    state = xxhash.xxh3_64()
    for _, tensor in named_tensors:
        if not wanted:
            continue
        raw = _bytes(tensor)
        state.update(raw)
        state.update(bytes(-len(raw) % 64))
        del tensor, raw  # before the next is made
    return str(state.hexdigest()) if wanted else ""


def _bytes(tensor: "torch.Tensor") -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
