"""The policy's weights on their way from the learner to the engines: one flat buffer, a version, a checksum.

A dictionary of tensors costs seconds to serialise and to fetch; one flat numpy buffer goes through Ray's object store
without a copy, and every engine of a node reads the same pages.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from ppo_ray.errors import WorkerError

_ALIGNMENT = 64  # bytes; vectorised loads of the engines never straddle a cache line


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a snapshot's buffer."""

    name: str
    """The parameter's name in the Hugging Face causal LM; a tied head is listed once, as the embedding."""
    dtype: str
    """torch's name, e.g. `"float32"`."""
    shape: tuple[int, ...]
    offset: int
    """In bytes."""

    @property
    def num_bytes(self) -> int:
        """Size in the buffer, without the padding behind it."""
        return int(np.prod(self.shape, dtype=np.int64)) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class WeightSnapshot:
    """The policy's weights after so many steps; what engines load, verify and acknowledge."""

    policy_version: int
    """How many steps the weights have seen."""
    checksum: str
    """XXH3-64 of `buffer`, hexadecimal."""
    entries: tuple[TensorEntry, ...]
    buffer: np.ndarray
    """`[bytes]` uint8; read-only once it comes out of the object store: never write to it."""

    @classmethod
    def take(cls, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> "WeightSnapshot":
        """Copy tensors (on any device) into one new buffer and seal it with its checksum."""
        tensors = [(name, tensor.detach()) for name, tensor in named_tensors]
        entries, offset = [], 0
        for name, tensor in tensors:
            entries.append(TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
            offset += -(-entries[-1].num_bytes // _ALIGNMENT) * _ALIGNMENT
        buffer = np.zeros(offset, np.uint8)
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            _view(buffer, entry).copy_(tensor)
        return cls(policy_version, xxhash.xxh3_64_hexdigest(buffer.data), tuple(entries), buffer)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each name and tensor as a view of the buffer: nothing is copied, nothing may be written."""
        for entry in self.entries:
            yield entry.name, _view(self.buffer, entry)

    def verify(self) -> None:
        """Check the buffer against the checksum.

        Raises:
            WorkerError: they differ: the weights were damaged between the learner and here.
        """
        found = xxhash.xxh3_64_hexdigest(self.buffer.data)
        if found != self.checksum:
            raise WorkerError(
                f"weights of policy version {self.policy_version} arrived damaged: checksum {found}, "
                f"sent as {self.checksum}"
            )


def weights_checksum(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the checksum that a snapshot of these tensors would have, without making one."""
    state = xxhash.xxh3_64()
    for _, tensor in named_tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        state.update(raw.data)
        state.update(bytes(-len(raw) % _ALIGNMENT))
    return state.hexdigest()


@dataclass(frozen=True)
class PublishedWeights:
    """Weights in an object store: their name, and a reference to a snapshot that the driver never fetches."""

    policy_version: int
    checksum: str
    snapshot: Any


@dataclass(frozen=True)
class WeightAck:
    """An engine's word that it serves a snapshot."""

    worker: str
    policy_version: int
    checksum: str
    load_s: float
    """Seconds from the call to the verified weights in the engine."""


def check_acks(snapshot_version: int, snapshot_checksum: str, acks: Iterable[WeightAck]) -> None:
    """Check that every engine serves the very weights that were sent.

    Raises:
        WorkerError: an engine acknowledged another version or checksum; the message names it.
    """
    for ack in acks:
        if (ack.policy_version, ack.checksum) != (snapshot_version, snapshot_checksum):
            raise WorkerError(
                f"{ack.worker} serves policy version {ack.policy_version} (checksum {ack.checksum}) after it was sent "
                f"version {snapshot_version} (checksum {snapshot_checksum}): its samples would be stale"
            )


def _view(buffer: np.ndarray, entry: TensorEntry) -> torch.Tensor:
    raw = np.ndarray(entry.num_bytes, np.uint8, buffer, entry.offset)
    with warnings.catch_warnings():  # "not writable": an object of the store, which nobody writes to
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.from_numpy(raw)
    return flat.view(getattr(torch, entry.dtype)).view(entry.shape)
