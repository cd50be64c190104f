"""What lies in host memory between the phases of an update that need it, so that others on the GPU have room.

A tensor that is put away stays the same object, with its type, shape and device. Its storage alone is emptied, as
torch's FSDP does it, and filled again with the same bytes. So whoever refers to it need not know: optimizer, modules,
sharded tensors. Until then nobody may compute with it.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

CHUNK_BYTES = 64 << 20
"""Host memory is taken in pieces of this size: a power of two, to which torch would round pinned memory up."""


@dataclass
class _Part:
    """Tensors that are away together."""

    list_tensors: Callable[[], Iterable[torch.Tensor]] = tuple
    away: dict[int, tuple[torch.UntypedStorage, int, int]] = field(default_factory=dict)
    """By the storage's address: the storage, where its bytes begin in the chunks, and how many they are."""
    chunks: list[torch.Tensor] = field(default_factory=list)
    """`[CHUNK_BYTES]` uint8 each; kept, and used again."""

    def pieces(self, storage: torch.UntypedStorage, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield pairs of pieces of a storage and their places on the host, both uint8, from byte `start` on."""
        rest = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        while len(rest):
            index, first = divmod(start, CHUNK_BYTES)
            if index == len(self.chunks):
                pinned = storage.device.type == "cuda"
                self.chunks.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned))
            place = self.chunks[index][first : first + len(rest)]
            yield rest[: len(place)], place
            rest, start = rest[len(place) :], start + len(place)

    def restore(self, storage: torch.UntypedStorage) -> None:
        """Fill the storage of a tensor that is away with its bytes; a GPU does it in its own time."""
        _, start, size = self.away[storage._cdata]
        storage.resize_(size)
        _copy(self.pieces(storage, start))


class Offload:
    """Named parts of a learner's state; those that were not chosen stay where they are. Not thread-safe."""

    def __init__(self, chosen: Collection[str] = ()) -> None:
        """Choose parts by their names."""
        self._parts = {name: _Part() for name in chosen}

    def __contains__(self, name: str) -> bool:
        """Say whether a part was chosen."""
        return name in self._parts

    def manage(self, name: str, list_tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Say which tensors, on one device, `put_away` is to take of a part: those that are listed at that time."""
        if name in self._parts:
            self._parts[name].list_tensors = list_tensors

    def put_away(self, name: str, *tensors: torch.Tensor) -> None:
        """Move a part's tensors into host memory, or these alone, which belong to it."""
        if name not in self._parts:
            return
        part = self._parts[name]
        taken = {}
        end = sum(size for _, _, size in part.away.values())
        for storage in map(_local_storage, tensors or part.list_tensors()):
            if storage.nbytes() and storage._cdata not in taken:
                taken[storage._cdata] = storage, end, storage.nbytes()
                _copy(((place, piece) for piece, place in part.pieces(storage, end)))
                end += storage.nbytes()
        _wait(storage for storage, _, _ in taken.values())
        for storage, _, _ in taken.values():
            storage.resize_(0)
        part.away |= taken

    def fetch(self, name: str) -> None:
        """Bring back all that is away of a part."""
        if name not in self._parts:
            return
        part = self._parts[name]
        for storage, _, _ in part.away.values():
            part.restore(storage)
        _wait(storage for storage, _, _ in part.away.values())
        part.away = {}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor is away."""
        return any(_local_storage(tensor)._cdata in part.away for part in self._parts.values())

    @contextlib.contextmanager
    def lend(self, tensor: torch.Tensor, changes: bool = False) -> Iterator[torch.Tensor]:
        """Bring back one tensor, if it is away, for the length of a block.

        Whoever keeps it longer, or makes a numpy array of it, copies it first: torch does not empty a storage that an
        array once was made of.

        Args:
            tensor: of any part, or of none.
            changes: whether the block may change it.
        """
        storage = _local_storage(tensor)
        part = next((part for part in self._parts.values() if storage._cdata in part.away), None)
        if part is None:
            yield tensor
            return
        part.restore(storage)
        yield tensor
        if changes:
            _copy((place, piece) for piece, place in part.pieces(storage, part.away[storage._cdata][1]))
            _wait([storage])
        storage.resize_(0)


def _local_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Return the storage of a tensor, or of this rank's shard of it."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _copy(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the second of each pair into the first; a GPU does it in its own time."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _wait(storages: Iterable[torch.UntypedStorage]) -> None:
    """Wait for copies from and to storages: other streams may use them next, or the host their copies."""
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.synchronize()
