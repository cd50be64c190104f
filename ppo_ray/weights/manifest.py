"""The manifest of a set of weights: name, shape, place and checksum of every tensor."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import xxhash

from ppo_ray.errors import WorkerError
from ppo_ray.weights.checksums import Method, byte_checksum, format_sums, word_sums

if TYPE_CHECKING:  # see `checksums`
    import torch

_ALIGNMENT = 64  # bytes; vectorised loads of the engines never straddle a cache line
_SHOWN = 3  # damaged tensors in an error


@dataclass(frozen=True)
class TensorEntry:
    """The entry of one tensor."""

    name: str
    """The parameter's name in the Hugging Face causal LM; a tied head is listed once, as the embedding. Adapters that
    travel alone have the name of their linear map, with `.lora_A.weight` or `.lora_B.weight` behind it."""
    dtype: str
    """torch's name, e.g. `"float32"`."""
    shape: tuple[int, ...]
    checksum: str
    """Checksum of the tensor as it is sent, hexadecimal."""
    bucket: int = 0
    """Index of the buffer that it lies in, where weights travel in buffers."""
    offset: int = 0
    """Place in that buffer, bytes from its start."""

    @property
    def num_bytes(self) -> int:
        """Size in the buffer, without the padding behind it."""
        import torch

        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def end(self) -> int:
        """Place behind it in the buffer, bytes from its start; of a bucket's last tensor it is the bucket's size."""
        return self.offset + self.num_bytes


@dataclass(frozen=True)
class WeightManifest:
    """The contents of a set of weights; small, where the weights are not."""

    policy_version: int
    """Number of updates that the weights have seen."""
    method: Method
    """Method of the checksums."""
    entries: tuple[TensorEntry, ...]

    @classmethod
    def of(
        cls,
        named_tensors: Iterable[tuple[str, "torch.Tensor"]],
        policy_version: int,
        method: Method,
        bucket_bytes: int = 256 << 20,
    ) -> "WeightManifest":
        """Describe tensors, on any device, one at a time; nothing is copied but what XXH3 needs on the host.

        Args:
            named_tensors: may be made as they are asked for; none is kept.
            policy_version: number of updates that they have seen.
            method: of the checksums.
            bucket_bytes: size of the buffers that they travel in.
        """
        cursor = BucketCursor(bucket_bytes)
        names, dtypes, shapes, places, found, sums = [], [], [], [], [], []
        for name, tensor in named_tensors:
            places.append(cursor.place(tensor.numel() * tensor.dtype.itemsize))
            names.append(name)
            dtypes.append(str(tensor.dtype).removeprefix("torch."))
            shapes.append(tuple(tensor.shape))
            if method == "xxh3":
                found.append(byte_checksum(tensor))
            else:
                sums.append(word_sums(tensor))
            del tensor  # before the next is made
        found += format_sums(sums)
        entries = map(TensorEntry, names, dtypes, shapes, found, *zip(*places, strict=True))
        return cls(policy_version, method, tuple(entries))

    @cached_property
    def checksum(self) -> str:
        """XXH3-64 of all names, dtypes, shapes and checksums: the same for any size of buckets."""
        lines = (f"{entry.name} {entry.dtype} {entry.shape} {entry.checksum}\n" for entry in self.entries)
        return str(xxhash.xxh3_64_hexdigest("".join(lines).encode()))

    def buckets(self) -> Iterator[tuple[int, list[TensorEntry]]]:
        """Yield the index of each bucket and the tensors that lie in it."""
        for bucket, entries in groupby(self.entries, lambda entry: entry.bucket):
            yield bucket, list(entries)

    def with_checksums(self, checksums: Iterable[str]) -> "WeightManifest":
        """Return a manifest of the same tensors with other checksums, one of each."""
        entries = (replace(entry, checksum=one) for entry, one in zip(self.entries, checksums, strict=True))
        return replace(self, entries=tuple(entries))

    def check(self, entries: Iterable[TensorEntry], found: Iterable[str]) -> None:
        """Compare the checksums of tensors that have arrived with those that they were sent with.

        Raises:
            WorkerError: names the tensors that differ.
        """
        wrong = [
            f"{entry.name} (checksum {one}, sent as {entry.checksum})"
            for entry, one in zip(entries, found, strict=True)
            if one != entry.checksum
        ]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise WorkerError(
                f"weights of policy version {self.policy_version} arrived damaged: {', '.join(wrong[:_SHOWN])}{more}"
            )


class BucketCursor:
    """The place of the next tensor: in the current bucket if there is room, else in a new one."""

    def __init__(self, bucket_bytes: int) -> None:
        """Start without a bucket; `bucket_bytes` is the size of each."""
        self._bucket_bytes = bucket_bytes
        self._bucket, self._used = -1, 0

    def place(self, num_bytes: int) -> tuple[int, int]:
        """Return bucket and offset of the next tensor, and move behind it."""
        if self._bucket < 0 or self._used + num_bytes > self._bucket_bytes:
            self._bucket, self._used = self._bucket + 1, 0
        offset = self._used
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._bucket, offset


def num_buckets(sizes: Iterable[int], bucket_bytes: int) -> int:
    """Return how many buckets a snapshot of tensors of these sizes, in bytes, will have."""
    cursor, placed = BucketCursor(bucket_bytes), 0
    for size in sizes:
        placed = cursor.place(size)[0] + 1
    return placed
