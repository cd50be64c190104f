import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.algo.masked import masked_mean, masked_sum, masked_var, masked_whiten, weighted_sum, whiten_zero

NAN = math.nan
X = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_mean_and_unbiased_variance_by_hand() -> None:
    assert masked_sum(X, MASK) == 9
    assert masked_mean(X, MASK) == 3
    assert masked_var(X, MASK) == 7  # (4 + 1 + 9) / 2
    assert weighted_sum(X, MASK, torch.tensor([0.5, 2.0])) == 13.5


def test_whiten_by_hand() -> None:
    root = math.sqrt(7)
    expected = torch.tensor([[-2 / root, -1 / root, 0], [3 / root, 0, 0]])
    torch.testing.assert_close(masked_whiten(X, MASK), expected)
    kept_mean = torch.where(MASK, expected + 3, 0)
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), kept_mean)


def test_what_whitening_would_make_of_a_zero_by_hand() -> None:
    assert float(whiten_zero(X, MASK)) == pytest.approx(3 - 3 / math.sqrt(7))


def test_whiten_leaves_equal_figures_at_zero() -> None:
    mask = torch.ones(64, 1024, dtype=torch.bool)
    for figure in (3.3, 100.1, 1000.1):  # in float32 the last would become 0.95
        constant = torch.full(mask.shape, figure)
        assert masked_whiten(constant, mask).abs().max() < 1e-6
        torch.testing.assert_close(masked_whiten(constant, mask, shift_mean=False), constant)


@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=20).filter(lambda xs: max(xs) - min(xs) > 1))
def test_whitened_figures_have_mean_0_and_variance_1(xs: list[float]) -> None:
    x = torch.tensor([xs, [7.7] * len(xs)], dtype=torch.float64)
    mask = torch.tensor([[True] * len(xs), [False] * len(xs)])
    whitened = masked_whiten(x, mask)
    assert float(whitened[0].mean()) == pytest.approx(0, abs=1e-9)
    assert float(whitened[0].var()) == pytest.approx(1, abs=1e-6)
    assert whitened[1].eq(0).all()


def test_garbage_outside_the_mask_reaches_neither_figures_nor_gradients() -> None:
    x = X.clone().requires_grad_()
    (masked_sum(x, MASK) + masked_var(x, MASK) + masked_whiten(x, MASK)[0, 0]).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[~MASK].eq(0).all()


@pytest.mark.parametrize(("function", "needed"), [(masked_mean, 1), (masked_var, 2), (masked_whiten, 2)])
def test_too_few_tokens_are_refused(function, needed: int) -> None:
    mask = torch.zeros(1, 3, dtype=torch.bool)
    mask[0, : needed - 1] = True
    with pytest.raises(ValueError, match=f"{needed - 1} True entries; this needs at least {needed}"):
        function(torch.ones(1, 3), mask)


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), TypeError, "mask is torch.float32"),
        (torch.ones(2, 3), torch.ones(2, dtype=torch.bool), ValueError, r"mask has shape \(2,\)"),
        (torch.ones(2, 1), torch.ones(2, 3, dtype=torch.bool), ValueError, r"x has shape \(2, 1\)"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), TypeError, "x is torch.int64"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(x, mask, error: type[Exception], message: str) -> None:
    for function in (masked_sum, masked_mean, masked_var, masked_whiten):
        with pytest.raises(error, match=message):
            function(x, mask)
