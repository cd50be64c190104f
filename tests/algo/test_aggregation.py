import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.algo.aggregation import token_weights

LENGTHS = [1, 3, 2, 2]


@pytest.mark.parametrize(
    ("aggregation", "parts", "expected"),
    [
        ("token_mean", 2, [1 / 8, 1 / 8, 1 / 8, 1 / 8]),
        ("sequence_mean", 2, [1 / 4, 1 / 12, 1 / 8, 1 / 8]),
        ("microbatch_mean", 2, [1 / 8, 1 / 8, 1 / 8, 1 / 8]),  # both parts have four tokens
        ("microbatch_mean", 4, [1 / 4, 1 / 12, 1 / 8, 1 / 8]),  # a part a sequence
        ("microbatch_mean", 3, [1 / 12, 1 / 12, 1 / 6, 1 / 6]),  # the first part takes two
    ],
)
def test_weights_by_hand(aggregation: str, parts: int, expected: list[float]) -> None:
    weights = token_weights(LENGTHS, aggregation, parts)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.sampled_from(["token_mean", "sequence_mean", "microbatch_mean"]),
    st.data(),
)
def test_all_tokens_together_weigh_one(lengths: list[int], aggregation: str, data: st.DataObject) -> None:
    weights = token_weights(lengths, aggregation, data.draw(st.integers(1, len(lengths))))
    assert float(weights @ torch.tensor(lengths, dtype=torch.float64)) == pytest.approx(1)


@pytest.mark.parametrize(("lengths", "parts"), [([], 1), ([2, 0], 1), ([2, 1], 3)])
def test_what_cannot_be_weighed_is_refused(lengths: list[int], parts: int) -> None:
    with pytest.raises(ValueError, match="cannot be weighed"):
        token_weights(lengths, "token_mean", parts)
