import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.errors import WorkerError
from ppo_ray.weights.manifest import WeightManifest, num_buckets
from ppo_ray.weights.snapshot import Buffers, WeightSnapshot, Wire

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8])
BUCKETS = st.sampled_from([1, 64, 100, 256, 1024])


def make(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"layer.{i}", (9 * torch.randn(shape, generator=generator)).to(dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    ]


@given(SHAPES, st.lists(DTYPES, min_size=8, max_size=8), BUCKETS, st.integers(0, 99))
def test_tensors_come_back_as_they_went(
    shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], bucket_bytes: int, seed: int
) -> None:
    tensors = make(shapes, dtypes, seed)
    taken = WeightSnapshot.take(iter(tensors), 4, Wire(bucket_bytes=bucket_bytes))
    snapshot = pickle.loads(pickle.dumps(taken, protocol=5))
    assert (snapshot.policy_version, snapshot.checksum) == (4, taken.checksum)
    returned = dict(snapshot.tensors())
    assert list(returned) == [name for name, _ in tensors]
    for name, tensor in tensors:
        assert returned[name].dtype == tensor.dtype
        assert torch.equal(returned[name], tensor)
    assert len(snapshot.buckets) == num_buckets((t.numel() * t.element_size() for _, t in tensors), bucket_bytes)
    for bucket, entries in snapshot.manifest.buckets():
        assert len(entries) == 1 or len(snapshot.buckets[bucket]) <= bucket_bytes


@given(SHAPES, st.lists(DTYPES, min_size=8, max_size=8), BUCKETS)
def test_the_checksum_is_of_the_tensors_not_of_their_buckets(
    shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], bucket_bytes: int
) -> None:
    tensors = make(shapes, dtypes)
    snapshot = WeightSnapshot.take(tensors, 1, Wire(bucket_bytes=bucket_bytes))
    assert snapshot.checksum == WeightManifest.of(iter(tensors), 2, "xxh3").checksum


@given(st.integers(0, 403), st.integers(1, 255))
def test_any_changed_byte_is_found(place: int, change: int) -> None:
    """Also in the last bucket, when those before it are loaded already."""
    tensors = make([(20,), (3, 7), (), (59,)], [torch.float32] * 4)
    snapshot = WeightSnapshot.take(tensors, 3, Wire(bucket_bytes=160))
    assert [len(bucket) for bucket in snapshot.buckets] == [80, 132, 236]
    damaged = [bucket.copy() for bucket in snapshot.buckets]
    where = [(0, i) for i in range(80)] + [(1, i) for i in range(84)] + [(1, 128 + i) for i in range(4)]
    where += [(2, i) for i in range(236)]
    bucket, offset = where[place]
    damaged[bucket][offset] ^= change
    name = "layer." + ("0" if bucket == 0 else "3" if bucket == 2 else "1" if offset < 84 else "2")
    received = replace(snapshot, buckets=damaged).verify_buckets()
    for _ in range(bucket):
        next(received)
    with pytest.raises(WorkerError, match=rf"policy version 3 arrived damaged: {name} \(checksum"):
        next(received)


def test_a_short_bucket_is_found() -> None:
    snapshot = WeightSnapshot.take([("w", torch.ones(100))], 1)
    with pytest.raises(WorkerError, match="bucket 0 has 300 bytes of 400"):
        list(replace(snapshot, buckets=(snapshot.buckets[0][:300],)).tensors())


@pytest.mark.parametrize(
    ("other", "version"),
    [
        ([("v", torch.ones(4))], 1),
        ([("w", torch.ones(2, 2))], 1),
        ([("w", torch.ones(4).bfloat16())], 1),
        ([("w", torch.tensor([1.0, 1, 1, 2]))], 1),
        ([("w", torch.ones(4)), ("x", torch.ones(0))], 1),
    ],
    ids=["name", "shape", "dtype", "value", "one more"],
)
def test_the_checksum_is_of_everything(other: list[tuple[str, torch.Tensor]], version: int) -> None:
    assert WeightSnapshot.take(other, version).checksum != WeightSnapshot.take([("w", torch.ones(4))], 1).checksum


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_the_wire_rounds_to_the_nearest_bfloat16(values: list[float]) -> None:
    tensors = [("w", torch.tensor(values, dtype=torch.float32)), ("steps", torch.tensor([7]))]
    snapshot = WeightSnapshot.take(tensors, 0, Wire("bfloat16"))
    arrived = dict(snapshot.tensors())
    assert arrived["w"].dtype == torch.bfloat16
    assert torch.equal(arrived["w"], tensors[0][1].bfloat16())
    assert arrived["steps"].tolist() == [7]
    assert snapshot.checksum == WeightManifest.of(Wire("bfloat16").round(tensors), 0, "xxh3").checksum


def test_the_wire_in_bfloat16_has_half_the_bytes() -> None:
    tensors = [("w", torch.ones(1000))]
    assert [len(bucket) for bucket in WeightSnapshot.take(tensors, 0, Wire("bfloat16")).buckets] == [2000]
    assert [len(bucket) for bucket in WeightSnapshot.take(tensors, 0).buckets] == [4000]


@pytest.mark.parametrize("wire", [Wire(bucket_bytes=64), Wire("bfloat16")])
def test_one_tensor_at_a_time(wire: Wire) -> None:
    """What makes the tensors (a gather over ranks) never has two of them at once."""

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(5):
            tensor = torch.full((10,), float(i))
            before = weakref.ref(tensor)
            yield f"w{i}", tensor
            del tensor
            assert before() is None

    snapshot = WeightSnapshot.take(gathered(), 0, wire)
    assert [tensor[0].item() for _, tensor in snapshot.tensors()] == [0, 1, 2, 3, 4]
    assert WeightManifest.of(wire.round(gathered()), 0, "xxh3").checksum == snapshot.checksum
    assert len(WeightManifest.of(wire.round(gathered()), 0, "sums").entries) == 5


def test_non_contiguous_tensors() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    ((_, returned),) = WeightSnapshot.take([("w", tensor)], 0).tensors()
    assert returned.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_snapshot_does_not_follow_later_updates() -> None:
    tensor = torch.zeros(3)
    snapshot = WeightSnapshot.take([("w", tensor)], 0)
    tensor += 1
    assert next(iter(snapshot.tensors()))[1].tolist() == [0, 0, 0]


def test_buffers_are_used_again() -> None:
    buffers, wire = Buffers(), Wire(bucket_bytes=64)
    first = WeightSnapshot.take([("a", torch.zeros(16)), ("b", torch.zeros(3))], 0, wire, buffers)
    second = WeightSnapshot.take([("a", torch.ones(16)), ("b", torch.ones(3))], 1, wire, buffers)
    for one, other in zip(first.buckets, second.buckets, strict=True):
        assert one.__array_interface__["data"][0] == other.__array_interface__["data"][0]
    assert [tensor.tolist() for _, tensor in second.tensors()] == [[1] * 16, [1] * 3]
    larger = WeightSnapshot.take([("a", torch.ones(50)), ("b", torch.ones(3))], 2, wire, buffers)
    assert [len(bucket) for bucket in larger.buckets] == [200, 12]


def test_read_only_buffers_are_viewed_without_a_copy() -> None:
    snapshot = WeightSnapshot.take([("w", torch.ones(100))], 1)
    snapshot.buckets[0].flags.writeable = False
    ((_, tensor),) = snapshot.tensors()
    assert tensor.data_ptr() == snapshot.buckets[0].__array_interface__["data"][0]
    assert isinstance(snapshot.buckets[0], np.ndarray)
