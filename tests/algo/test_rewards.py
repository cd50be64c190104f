import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.algo.rewards import RunningMoments, clip_scores, penalise_missing_eos, scale_scores, token_rewards

KL = torch.tensor([[0.5, -1.0, 2.0], [0.25, math.nan, math.nan]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_score_lands_on_each_rows_last_token() -> None:
    rewards = token_rewards(KL, torch.tensor([3.0, -1.0]), MASK, kl_coef=0.2)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 2.6], [-1.05, 0.0, 0.0]]))


def test_clipping_holds_score_and_penalty_together() -> None:
    rewards = token_rewards(KL, torch.tensor([3.0, -1.0]), MASK, kl_coef=0.2, clip=1.0)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 1.0], [-1.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        (torch.tensor([1.0, math.nan]), MASK, "not finite"),
        (torch.tensor([[1.0], [2.0]]), MASK, r"scores are torch.float32 \(2, 1\)"),
        (torch.tensor([1.0, 2.0]), MASK & torch.tensor([[True], [False]]), "mask row 1"),
        (torch.tensor([1.0, 2.0]), torch.tensor([[True, False, True], [True, False, False]]), "mask row 0"),
    ],
)
def test_bad_input_is_refused(scores: torch.Tensor, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_rewards(KL, scores, mask, kl_coef=0.2)


def test_moments_by_hand() -> None:
    moments = RunningMoments().include(torch.tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.var) == (2, 2.0, 1.0)
    assert moments.std == pytest.approx(math.sqrt(2))
    moments = moments.include(torch.tensor([5.0]))  # 1, 3, 5
    assert (moments.count, moments.mean) == (3, 3.0)
    assert moments.var == pytest.approx(8 / 3)
    assert moments.std == pytest.approx(2.0)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=8), min_size=1, max_size=6))
def test_moments_of_batches_are_those_of_all_scores(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments = moments.include(torch.tensor(batch, dtype=torch.float64))
    scores = torch.tensor([score for batch in batches for score in batch], dtype=torch.float64)
    assert moments.count == len(scores)
    if len(scores) > 1:
        assert moments.mean == pytest.approx(float(scores.mean()), abs=1e-9)
        assert moments.std == pytest.approx(float(scores.std()), abs=1e-6)


def test_scaling_by_hand() -> None:
    scores, moments = torch.tensor([1.0, 5.0]), RunningMoments(count=3, mean=3.0, var=8 / 3)
    torch.testing.assert_close(scale_scores(scores, moments), torch.tensor([0.5, 2.5]))
    torch.testing.assert_close(scale_scores(scores, moments, subtract_mean=True), torch.tensor([-1.0, 1.0]))
    assert scores.tolist() == [1.0, 5.0]


def test_scores_that_are_all_equal_are_not_blown_up() -> None:
    scores = torch.full((4,), 0.25)
    moments = RunningMoments().include(scores)
    assert scale_scores(scores, moments).tolist() == [0.25] * 4
    assert scale_scores(scores, moments, subtract_mean=True).tolist() == [0.0] * 4


def test_clipping_and_the_missing_end_by_hand() -> None:
    assert clip_scores(torch.tensor([-3.0, 0.5, 2.0]), 1.5).tolist() == [-1.5, 0.5, 1.5]
    ended = torch.tensor([True, False])
    assert penalise_missing_eos(torch.tensor([1.0, 1.0]), ended, 0.75).tolist() == [1.0, 0.25]


def test_moments_refuse_scores_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        RunningMoments().include(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"ended is torch.int64 \(2,\), not torch.bool \(3,\)"):
        penalise_missing_eos(torch.zeros(3), torch.tensor([0, 1]), 1.0)
