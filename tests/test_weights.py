import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.errors import WorkerError
from ppo_ray.weights import WeightAck, WeightSnapshot, check_acks

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 99))
def test_tensors_come_back_as_they_went(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [(f"layer.{i}", torch.randn(shape, generator=generator).to(dtype)) for i, shape in enumerate(shapes)]
    snapshot = pickle.loads(pickle.dumps(WeightSnapshot.take(tensors, 4), protocol=5))
    snapshot.verify()
    assert snapshot.policy_version == 4
    returned = dict(snapshot.tensors())
    assert list(returned) == [name for name, _ in tensors]
    for name, tensor in tensors:
        assert returned[name].dtype == dtype
        assert torch.equal(returned[name], tensor)


def test_non_contiguous_tensors() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    ((_, returned),) = WeightSnapshot.take([("w", tensor)], 0).tensors()
    assert returned.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_snapshot_does_not_follow_later_updates() -> None:
    tensor = torch.zeros(3)
    snapshot = WeightSnapshot.take([("w", tensor)], 0)
    tensor += 1
    assert next(iter(snapshot.tensors()))[1].tolist() == [0, 0, 0]


def test_one_flipped_bit_is_found() -> None:
    snapshot = WeightSnapshot.take([("w", torch.ones(100))], 1)
    assert snapshot.checksum == xxhash.xxh3_64(snapshot.buffer.tobytes()).hexdigest()
    damaged = snapshot.buffer.copy()
    damaged[17] ^= 1
    with pytest.raises(WorkerError, match="policy version 1 arrived damaged"):
        replace(snapshot, buffer=damaged).verify()


def test_read_only_buffers_are_viewed_without_a_copy() -> None:
    snapshot = WeightSnapshot.take([("w", torch.ones(100))], 1)
    snapshot.buffer.flags.writeable = False
    ((_, tensor),) = snapshot.tensors()
    assert tensor.data_ptr() == snapshot.buffer.__array_interface__["data"][0]
    assert isinstance(snapshot.buffer, np.ndarray)


@pytest.mark.parametrize(("version", "checksum"), [(6, "aa"), (7, "bb")])
def test_a_wrong_acknowledgement_names_the_worker(version: int, checksum: str) -> None:
    good = WeightAck("rollout-0", 7, "aa", 0.1)
    check_acks(7, "aa", [good])
    with pytest.raises(WorkerError, match=r"rollout-1 serves policy version .* version 7 \(checksum aa\)"):
        check_acks(7, "aa", [good, WeightAck("rollout-1", version, checksum, 0.1)])
