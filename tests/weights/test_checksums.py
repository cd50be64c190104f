import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.weights import checksums
from ppo_ray.weights.checksums import byte_checksum, format_sums, weights_checksum, word_sums


def sums(tensor: torch.Tensor) -> str:
    return format_sums([word_sums(tensor)])[0]


def test_literal_sums() -> None:
    assert word_sums(torch.tensor([5, -1, 2], dtype=torch.int32)).tolist() == [6, 9]
    assert sums(torch.tensor([5, -7], dtype=torch.int32)) == "fffffffffffffffe" + "fffffffffffffff7"
    assert word_sums(torch.tensor([5, 2**32 + 7])).tolist() == [5 + 7 + 1, 5 + 3 * 7 + 4 * 1]
    assert sums(torch.tensor(1.0)) == f"{0x3F800000:016x}" * 2  # the bits of a float, not its value
    assert sums(torch.ones(2, dtype=torch.bfloat16)) == f"{2 * 0x3F80:016x}{3 * 0x3F80:016x}"
    assert sums(torch.ones(0)) == "0" * 32
    assert format_sums([]) == []


def test_sums_are_of_signed_integers() -> None:
    words = np.random.default_rng(0).integers(-(2**31), 2**31, 1000, np.int32)
    places = np.arange(1, 1001)
    expected = [sum(map(int, words)), sum(int(w) * int(i) for w, i in zip(words, places, strict=True))]
    assert sums(torch.from_numpy(words)) == "".join(f"{value % 2**64:016x}" for value in expected)


def test_sums_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(101, 7, generator=torch.Generator().manual_seed(0))
    whole = sums(tensor)
    monkeypatch.setattr(checksums, "_PIECE", 10)
    assert sums(tensor) == whole
    assert sums(tensor.T) != whole
    assert sums(tensor.T.contiguous().T) == whole


@pytest.mark.parametrize("checksum", [byte_checksum, sums])
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    st.lists(st.integers(-100, 100), min_size=1, max_size=30),
    st.data(),
)
def test_any_change_of_one_or_two_elements_is_found(checksum, dtype, values, data) -> None:
    tensor = torch.tensor(values).to(dtype)
    changed = tensor.clone()
    raw = changed.view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum(changed) != checksum(tensor)
    if dtype.itemsize == 8:
        return
    i, j = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    swapped = tensor.clone()
    swapped[[i, j]] = swapped[[j, i]]
    assert (checksum(swapped) == checksum(tensor)) == torch.equal(swapped, tensor)


def test_bytes() -> None:
    tensor = torch.arange(10.0)
    assert byte_checksum(tensor) == xxhash.xxh3_64(tensor.numpy().tobytes()).hexdigest()
    assert byte_checksum(tensor.view(2, 5).T) == xxhash.xxh3_64(tensor.numpy().reshape(2, 5).T.tobytes()).hexdigest()
    assert byte_checksum(torch.ones(0)) == xxhash.xxh3_64(b"").hexdigest()


def test_a_checkpoint_is_known_by_the_bytes_of_its_tensors() -> None:
    """Which earlier checkpoints are known by: it may never change."""
    tensors = [("a", torch.arange(3.0)), ("b", torch.ones(2, 8, dtype=torch.float64)), ("c", torch.ones(0))]
    padded = tensors[0][1].numpy().tobytes() + bytes(52) + tensors[1][1].numpy().tobytes()
    assert weights_checksum(iter(tensors)) == xxhash.xxh3_64(padded).hexdigest()
