import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppo_ray.algo.losses import clipped_surrogate, clipped_value_loss

MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, math.nan, math.nan]])
RATIO = torch.tensor([[1.5, 1.5, 0.5], [0.5, 7.0, 7.0]])
LOGPROBS = OLD + RATIO.log()
ADVANTAGES = torch.tensor([[2.0, -2.0, 2.0], [-2.0, math.nan, 9.0]])


def test_surrogate_by_hand() -> None:
    # gain above 1.2 is held back: -2 * 1.2; loss is not: 2 * 1.5; gain falling is not: -2 * 0.5; loss below is: 2 * 0.8
    result = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_range=0.2, num_tokens=8)
    assert float(result.loss) == pytest.approx((-2.4 + 3.0 - 1.0 + 1.6) / 8)
    assert float(result.clipped_sum) == 2
    assert float(result.ratio_sum) == pytest.approx(4.0)
    assert float(result.ratio_max) == pytest.approx(1.5)
    up, down = math.log(1.5), math.log(0.5)
    assert float(result.approx_kl_sum) == pytest.approx(up**2 + down**2)
    assert float(result.kl_sum) == pytest.approx(-2 * up - 2 * down)


def test_value_loss_by_hand() -> None:
    old_values = torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, 0.0]])
    values = torch.tensor([[1.1, 2.0, 2.0], [0.0, 5.0, math.nan]])
    returns = torch.tensor([[0.1, 0.2, 2.2], [1.0, 0.0, 0.0]])
    # errors 1, 1.8, -0.2, -1; held values 1.1, 1.2, 1.2, 0.8 have errors 1, 1, -1, -0.2; the larger square counts
    result = clipped_value_loss(values, old_values, returns, MASK, value_clip_range=0.2, num_tokens=10)
    assert float(result.loss) == pytest.approx(0.5 * (1 + 3.24 + 1 + 1) / 10)
    assert float(result.clipped_sum) == 1
    assert float(result.error_sum) == pytest.approx(1 + 3.24 + 0.04 + 1)


def test_gradient_is_the_plain_policy_gradient_before_anything_moved() -> None:
    logprobs = OLD.clone().requires_grad_()
    clipped_surrogate(logprobs, OLD, ADVANTAGES, MASK, clip_range=0.2, num_tokens=4).loss.backward()
    expected = [[-0.5, 0.5, -0.5], [0.5, 0.0, 0.0]]  # -A / 4, and nothing from the NaN outside the mask
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


@given(st.integers(0, 2**31))
def test_gradients_agree_with_finite_differences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new, old, target = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    new = (old + 0.3 * new).requires_grad_()
    moved = (new - old).detach()
    distance = (moved.exp() - 1).abs().sub(0.2).abs().minimum(moved.abs().sub(0.2).abs()).min()
    assume(distance > 1e-3)  # at a kink there is no derivative
    surrogate = clipped_surrogate(new, old, target, MASK, 0.2, 5).loss
    value = clipped_value_loss(new, old, target, MASK, 0.2, 5).loss
    for loss, function in ((surrogate, clipped_surrogate), (value, clipped_value_loss)):
        (gradient,) = torch.autograd.grad(loss, new)
        for row, column in ((0, 0), (0, 2), (1, 0), (1, 2)):
            step = torch.zeros_like(new)
            step[row, column] = 1e-6
            above, below = (float(function(new.detach() + d, old, target, MASK, 0.2, 5).loss) for d in (step, -step))
            assert float(gradient[row, column]) == pytest.approx((above - below) / 2e-6, abs=1e-5)


@pytest.mark.parametrize("function", [clipped_surrogate, clipped_value_loss])
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_parts_of_a_minibatch_add_up_to_the_whole(function, split: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, target, noise = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 5, (7, 1), generator=generator)
    mask = torch.arange(4)[None] < lengths
    num_tokens = int(mask.sum())

    def run(rows: slice) -> tuple[object, torch.Tensor]:
        new = (old[rows] + 0.3 * noise[rows]).requires_grad_()
        result = function(new, old[rows], target[rows], mask[rows], 0.2, num_tokens)
        return result, torch.autograd.grad(result.loss, new)[0]

    whole, gradient = run(slice(None))
    parts = [run(slice(split)), run(slice(split, None))]
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=1e-15)
    for name in (name for name in vars(whole) if name != "ratio_max"):
        torch.testing.assert_close(sum(getattr(part, name) for part, _ in parts), getattr(whole, name))


@pytest.mark.parametrize("function", [clipped_surrogate, clipped_value_loss])
def test_a_denominator_below_the_tokens_at_hand_is_refused(function) -> None:
    with pytest.raises(ValueError, match="num_tokens=3, but there are 4 tokens"):
        function(LOGPROBS, OLD, ADVANTAGES, MASK, 0.2, 3)


@pytest.mark.parametrize("function", [clipped_surrogate, clipped_value_loss])
def test_a_figure_that_would_broadcast_is_refused(function) -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 1\); it must be the mask's, \(2, 3\)"):
        function(LOGPROBS, OLD[:, :1], ADVANTAGES, MASK, 0.2, 4)
