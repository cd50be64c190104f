"""Snapshots: copies of the policy's weights on the host, in buckets, and the form in which weights travel.

A dictionary of tensors costs seconds to serialise and to fetch; flat numpy buffers go through Ray's object store
without a copy, and every engine of a node reads the same pages. A bucket is an object of its own, so that an engine
loads the first while the next is on its way, and no store must find room for a model in one piece.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ppo_ray.errors import WorkerError, first_line
from ppo_ray.weights.checksums import byte_checksum
from ppo_ray.weights.manifest import BucketCursor, TensorEntry, WeightManifest

if TYPE_CHECKING:  # see `checksums`
    import torch

NUM_BUFFERS = 1
"""Buffers of an NCCL broadcast. With two, vLLM loads a layer on the stream of the piece that completes it, while the
memory of its earlier pieces goes back to another stream, which may write there."""


@dataclass(frozen=True)
class Wire:
    """The form in which tensors travel: their precision, and the size of the buffers that hold them."""

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

    def round(self, named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield what arrives of each tensor, one at a time: itself, or a copy in the wire's dtype."""
        for name, tensor in named_tensors:
            tensor = tensor.detach().to(self.dtype_of(tensor))
            yield name, tensor
            del tensor  # before the next is made


class Buffers:
    """Memory for snapshots, reused: the first touch of a page costs more than a copy into it.

    A snapshot that was taken into buffers is overwritten by the next one.
    """

    def __init__(self) -> None:
        """Start without buffers."""
        self._buffers: list[torch.Tensor] = []

    def get(self, index: int, num_bytes: int, pinned: bool) -> np.ndarray:
        """Return the buffer of a bucket, of at least `num_bytes`; its contents are those of its last use.

        Args:
            index: of the bucket, at most one more than the largest index so far.
            num_bytes: smallest size of the buffer.
            pinned: whether a GPU writes to it: page-locked memory takes a GPU's tensors twice as fast.
        """
        import torch

        if index == len(self._buffers) or self._buffers[index].numel() < num_bytes:
            self._buffers[index:] = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)]
        return self._buffers[index].numpy()


@dataclass(frozen=True)
class WeightSnapshot:
    """Weights on the host; engines load, verify and acknowledge them."""

    manifest: WeightManifest
    buckets: Sequence[np.ndarray]
    """`[bytes]` uint8 each; may be fetched when they are asked for. Those of an object store are read-only."""

    @property
    def policy_version(self) -> int:
        """Number of updates that the weights have seen."""
        return self.manifest.policy_version

    @property
    def checksum(self) -> str:
        """Checksum of all tensors; see `WeightManifest.checksum`."""
        return self.manifest.checksum

    @classmethod
    def take(
        cls,
        named_tensors: Iterable[tuple[str, "torch.Tensor"]],
        policy_version: int,
        wire: Wire | None = None,
        buffers: Buffers | None = None,
    ) -> "WeightSnapshot":
        """Copy tensors, on any device, one at a time, and seal each with its checksum.

        Args:
            named_tensors: may be made as they are asked for; none is kept.
            policy_version: number of updates that they have seen.
            wire: the form in which they travel; None: as they are, in buckets of the default size.
            buffers: memory to take them into; None: new memory.
        """
        entries: list[TensorEntry] = []
        filled = tuple(fill_buckets(named_tensors, wire or Wire(), buffers or Buffers(), entries))
        return cls(WeightManifest(policy_version, "xxh3", tuple(entries)), filled)

    def tensors(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield each name and tensor as a view of its bucket: nothing is copied, nothing may be written."""
        for tensors in self.verify_buckets():
            yield from tensors

    def verify_buckets(self) -> Iterator[list[tuple[str, "torch.Tensor"]]]:
        """Yield the tensors of one bucket after the other as views, each checked against its checksum.

        Raises:
            WorkerError: a tensor was damaged between the learner and here; names it.
        """
        for bucket, entries in self.manifest.buckets():
            damaged = f"weights of policy version {self.policy_version} arrived damaged: bucket {bucket}"
            if not 0 <= bucket < len(self.buckets):
                raise WorkerError(f"{damaged} is none of {len(self.buckets)}")
            buffer = self.buckets[bucket]
            try:
                if any(entry.offset < 0 or min(entry.shape, default=0) < 0 for entry in entries):
                    raise ValueError("a place or a size below 0")  # numpy would read before the buffer
                if len(buffer) < (end := max(entry.end for entry in entries)):
                    raise WorkerError(f"{damaged} has {len(buffer)} bytes of {end}")
                views = [_view(buffer, entry) for entry in entries]
            except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                raise WorkerError(f"{damaged}: its manifest does not fit: {first_line(error)}") from error
            self.manifest.check(entries, map(byte_checksum, views))
            yield [(entry.name, view) for entry, view in zip(entries, views, strict=True)]


def fill_buckets(
    named_tensors: Iterable[tuple[str, "torch.Tensor"]],
    wire: Wire,
    buffers: Buffers,
    entries: list[TensorEntry],
    *,
    one_at_a_time: bool = False,
) -> Iterator[np.ndarray]:
    """Copy tensors, on any device, one at a time into buckets, and yield each bucket when it is full.

    Args:
        named_tensors: may be made as they are asked for; none is kept.
        wire: the form in which they travel.
        buffers: memory to copy them into.
        entries: gets the entry of each tensor, sealed with its checksum, before its bucket is yielded.
        one_at_a_time: whether all buckets are in the memory of the first: the caller must be done with one before it
            asks for the next.
    """
    cursor, room, index = BucketCursor(wire.bucket_bytes), np.empty(0, np.uint8), -1
    for name, tensor in named_tensors:
        num_bytes = wire.num_bytes(tensor)
        bucket, offset = cursor.place(num_bytes)
        if bucket != index:
            if index >= 0:
                yield room[: entries[-1].end]
            place, index = 0 if one_at_a_time else bucket, bucket
            room = buffers.get(place, max(wire.bucket_bytes, num_bytes), tensor.is_cuda)
        dtype, shape = str(wire.dtype_of(tensor)).removeprefix("torch."), tuple(tensor.shape)
        view = _view(room, TensorEntry(name, dtype, shape, "", bucket, offset))
        view.copy_(tensor.detach())
        entries.append(TensorEntry(name, dtype, shape, byte_checksum(view), bucket, offset))
        del tensor  # before the next is made
    if index >= 0:
        yield room[: entries[-1].end]


def _view(buffer: np.ndarray, entry: TensorEntry) -> "torch.Tensor":
    import torch

    raw = np.ndarray(entry.num_bytes, np.uint8, buffer, entry.offset)
    with warnings.catch_warnings():  # "not writable": an object of the store, which nobody writes to
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.from_numpy(raw)
    return flat.view(getattr(torch, entry.dtype)).view(entry.shape)
