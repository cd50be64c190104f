"""Advantages without values, and those of VAPO, against what the peers' own functions return.

The peers: verl b178a3c, NeMo-RL 7ea279a, SkyRL a956457, each run in float64.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.algo.advantages import (
    group_advantages,
    length_adaptive_lambda,
    rewards_to_go,
    sum_rewards,
)
from ppo_ray.algo.masked import masked_whiten
from ppo_ray.algo.rewards import gae, token_rewards

LENGTHS = [3, 1, 2, 3]
MASK = torch.arange(3)[None] < torch.tensor(LENGTHS)[:, None]
SCORES = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
PAIRS, ONE = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)
NAN = math.nan


def padded(rows: list[list[float]], fill: float = NAN) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (3 - len(row))] for row in rows], dtype=torch.float64)


KL = padded([[0.1, -0.2, 0.3], [0.4], [0.0, 0.1], [-0.1, 0.2, 0.05]])
VALUES = padded([[0.5, 0.6, 0.8], [0.2], [0.1, 0.3], [1.0, 1.2, 1.5]])
REWARDS = token_rewards(KL, SCORES, MASK, 0.1)


def close(found: torch.Tensor, rows: list[list[float]]) -> None:
    assert found[~MASK].eq(0).all()
    torch.testing.assert_close(found, padded(rows, 0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("baseline", "groups", "wanted"),
    [
        ("grpo", PAIRS, [0.707106, -0.707106, -0.707106, 0.707106]),
        ("dr_grpo", PAIRS, [0.5, -0.5, -0.75, 0.75]),
        ("rloo", PAIRS, [1.0, -1.0, -1.5, 1.5]),
        ("grpo", ONE, [0.146385, -1.024694, -0.439155, 1.317464]),
        ("dr_grpo", ONE, [0.125, -0.875, -0.375, 1.125]),
        ("rloo", ONE, [0.166667, -1.166667, -0.5, 1.5]),
    ],
)
def test_groups_are_those_of_verl(baseline: str, groups: torch.Tensor, wanted: list[float]) -> None:
    assert group_advantages(SCORES, groups, baseline).tolist() == pytest.approx(wanted, abs=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    names = torch.tensor([70, -3])[groups]  # whatever the groups are called, and wherever their rows stand
    found = group_advantages(SCORES[order], names[order], baseline)
    assert found.tolist() == pytest.approx([wanted[row] for row in order], abs=1e-6)


@pytest.mark.parametrize("baseline", ["grpo", "dr_grpo", "rloo"])
@given(
    score=st.floats(-1e6, 1e6, width=32),
    size=st.integers(1, 17),
    others=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=4),
)
def test_equal_scores_give_exactly_0(baseline: str, score: float, size: int, others: list[float]) -> None:
    """Float32 peers give up to 0.48: their rounding noise over its own tiny deviation."""
    scores = torch.tensor([score] * size + others)
    groups = torch.tensor([0] * size + [1] * len(others))
    found = group_advantages(scores, groups, baseline)
    assert found[:size].eq(0).all()
    assert abs(float(found[size:].double().sum())) < 1e-4


def test_a_missing_member_makes_its_group_smaller() -> None:
    found = group_advantages(torch.tensor([1.0, 4.0, 2.0]), torch.tensor([5, 5, 9]), "rloo")
    assert found.tolist() == [-3.0, 3.0, 0.0]  # one alone has nothing to be compared with


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        (torch.tensor([1.0, NAN]), ONE[:2], "not finite"),
        (torch.tensor([1.0, 2.0]), ONE[:1], r"int64 \(1,\) and their figures torch.float32 \(2,\)"),
        (torch.tensor([1.0, 2.0]), ONE[:2].int(), "int32"),
    ],
)
def test_what_is_no_group_is_refused(scores: torch.Tensor, groups: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(scores, groups, "grpo")


def test_a_return_is_the_sum_of_a_responses_rewards() -> None:
    assert sum_rewards(REWARDS, MASK).tolist() == pytest.approx([0.98, -0.04, 0.49, 1.985])


def test_reinforce_plus_plus_is_verls() -> None:
    whitened = masked_whiten(rewards_to_go(REWARDS, MASK, 1.0), MASK)
    wanted = [[-0.151441, -0.138013, -0.164869], [-1.521123], [-0.809425] * 2, [1.198099, 1.184671, 1.211527]]
    close(whitened, wanted)


def test_rewards_to_go_are_discounted() -> None:
    found = rewards_to_go(padded([[1.0, 0.0, 4.0], [3.0], [0.0, 2.0], [0.0, 0.0, 8.0]]), MASK, 0.5)
    close(found, [[2.0, 2.0, 4.0], [3.0], [1.0, 2.0], [2.0, 4.0, 8.0]])


def test_reinforce_plus_plus_with_a_baseline_is_verls() -> None:
    centred = group_advantages(SCORES, PAIRS, "dr_grpo")[:, None].expand(4, 3)
    wanted = [0.463801, -1.054093, -1.433566, 0.843274]
    close(masked_whiten(centred, MASK), [[value] * n for value, n in zip(wanted, LENGTHS, strict=True)])


def test_gae_is_nemos() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, 1.0, 0.95)
    close(advantages, [[0.452425, 0.3815, 0.17], [-0.24], [0.3805, 0.19], [0.922737, 0.75025, 0.495]])
    close(returns, [[0.952425, 0.9815, 0.97], [-0.04], [0.4805, 0.49], [1.922737, 1.95025, 1.995]])


def test_vapos_two_lambdas_are_nemos() -> None:
    _, returns = gae(REWARDS, VALUES, MASK, 1.0, 1.0)
    close(returns, [[0.98, 0.99, 0.97], [-0.04], [0.49, 0.49], [1.985, 1.975, 1.995]])
    adaptive = length_adaptive_lambda(MASK.sum(1), 1.0)
    assert adaptive.tolist() == pytest.approx([2 / 3, 0, 1 / 2, 2 / 3])
    advantages, _ = gae(REWARDS, VALUES, MASK, 1.0, adaptive)
    close(advantages, [[0.312222, 0.333333, 0.17], [-0.24], [0.295, 0.19], [0.616667, 0.61, 0.495]])
    wanted = [[0.011712, 0.091825, -0.527992], [-2.083858], [-0.053642, -0.452096], [1.167017, 1.141718, 0.705317]]
    close(masked_whiten(advantages, MASK), wanted)


def test_the_lambda_of_a_length_is_vapos() -> None:
    found = length_adaptive_lambda(torch.tensor([1, 20, 100, 1000, 8192]), 0.05)
    assert found.tolist() == pytest.approx([0, 0, 0.8, 0.98, 0.997559], abs=1e-6)
    with pytest.raises(ValueError, match="alpha=0; it must be above 0"):
        length_adaptive_lambda(torch.tensor([3]), 0)


def test_a_lambda_for_each_row_is_that_row_alone() -> None:
    lambdas = torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=torch.float64)
    together = gae(REWARDS, VALUES, MASK, 0.9, lambdas)[0]
    for row, value in enumerate(lambdas.tolist()):
        alone = gae(REWARDS[row : row + 1], VALUES[row : row + 1], MASK[row : row + 1], 0.9, value)[0]
        torch.testing.assert_close(together[row : row + 1], alone)
    with pytest.raises(ValueError, match=r"gae_lambda has shape \(3,\); it must be \[B\]"):
        gae(REWARDS, VALUES, MASK, 0.9, lambdas[:3])
