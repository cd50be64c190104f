import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.algo.rewards import gae, padding_advantages

NAN = math.nan
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [3.0, NAN, NAN]])
VALUES = torch.tensor([[0.5, 1.0, -1.0], [1.0, NAN, NAN]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_by_hand() -> None:
    # deltas with gamma 0.5: 2 + 0 + 1 = 3; 0 - 0.5 - 1 = -1.5; 1 + 0.5 - 0.5 = 1; short row: 3 - 1 = 2
    # advantages with gamma * lambda = 0.25: 3; -1.5 + 0.75 = -0.75; 1 - 0.1875 = 0.8125
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.8125, -0.75, 3.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.3125, 0.25, 2.0], [3.0, 0.0, 0.0]]


def test_lambda_0_is_the_temporal_difference() -> None:
    advantages, _ = gae(REWARDS, VALUES, MASK, gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [[1.5, -2.0, 3.0], [2.0, 0.0, 0.0]]


def test_lambda_1_returns_the_sum_of_rewards_to_come_whatever_the_values() -> None:
    _, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == [[3.0, 2.0, 2.0], [3.0, 0.0, 0.0]]


def test_gamma_0_looks_at_the_next_reward_only() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.0, gae_lambda=1.0)
    assert returns.tolist() == [[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]]
    assert advantages.tolist() == [[0.5, -1.0, 3.0], [2.0, 0.0, 0.0]]


figures = st.floats(-5, 5)


@given(st.lists(st.lists(st.tuples(figures, figures), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_row_is_the_same_alone_as_in_a_batch(rows: list[list[tuple[float, float]]]) -> None:
    width = max(len(row) for row in rows)
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
    rewards, values = (
        torch.tensor([[step[part] for step in row] + [NAN] * (width - len(row)) for row in rows], dtype=torch.float64)
        for part in (0, 1)
    )
    together = gae(rewards, values, mask, 0.9, 0.7)
    for index, row in enumerate(rows):
        part = slice(index, index + 1), slice(len(row))
        alone = gae(rewards[part], values[part], mask[part], 0.9, 0.7)
        for found, wanted in zip(together, alone, strict=True):
            assert found[part].tolist() == wanted.tolist()
            assert found[index, len(row) :].eq(0).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_sums_by_doubling_are_the_recursion(lengths: list[int], gamma: float, gae_lambda: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    rewards, values = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    lambdas = torch.linspace(gae_lambda, 1, len(lengths), dtype=torch.float64)
    final = torch.randn(len(lengths), generator=rng, dtype=torch.float64)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    advantages, _ = gae(rewards, values, mask, gamma, lambdas, final)
    for row, length in enumerate(lengths):
        following, next_value = final[row], torch.tensor(0.0)
        for t in reversed(range(length)):
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            following, next_value = delta + gamma * lambdas[row] * following, values[row, t]
            assert float(advantages[row, t]) == pytest.approx(float(following), rel=1e-12, abs=1e-12)


def test_a_hole_in_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask row 1 must be some True, then only False; it is \[1, 0, 1\]"):
        gae(REWARDS, VALUES, torch.tensor([[True, True, True], [True, False, True]]), 1.0, 0.95)


def test_what_follows_the_last_token_may_have_an_advantage() -> None:
    rewards, values = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    advantages, _ = gae(rewards, values, mask, 1.0, 0.5, torch.tensor([4.0, 8.0]))
    # 2 + 4 / 2, then 1 + 4 / 2; 3 + 8 / 2
    assert advantages.tolist() == [[3.0, 4.0], [7.0, 0.0]]


def test_the_advantage_of_padding_by_hand() -> None:
    reward, lengths = torch.tensor(2.0), torch.tensor([0, 1, 3])
    assert padding_advantages(reward, lengths, 1.0, 0.5).tolist() == [0.0, 2.0, 3.5]  # 2 (1 + 1/2 + 1/4)
    assert padding_advantages(reward, lengths, 1.0, 1.0).tolist() == [0.0, 2.0, 6.0]
