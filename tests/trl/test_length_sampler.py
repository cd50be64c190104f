import numpy as np
import pytest

from ppo_ray.trl import LengthSampler


def test_the_range_is_half_open() -> None:
    np.random.seed(0)
    sampler = LengthSampler(2, 8)
    assert {sampler() for _ in range(500)} == {2, 3, 4, 5, 6, 7}


def test_a_seeded_script_draws_trls_lengths() -> None:
    np.random.seed(0)
    sampler = LengthSampler(4, 16)
    assert [sampler() for _ in range(8)] == [9, 4, 7, 15, 7, 11, 13, 7]  # drawn by TRL 0.11.3


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="max_value itself is never drawn"):
        LengthSampler(4, 4)
