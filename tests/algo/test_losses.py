import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppo_ray.algo.losses import clipped_value_loss, token_weights, truncated_importance
from ppo_ray.algo.surrogates import cispo_surrogate, clipped_surrogate, custom_surrogate, gspo_surrogate

MASK = torch.tensor([[True, True, True], [True, False, False]])
WEIGHTS = torch.tensor([0.125, 0.25])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, math.nan, math.nan]])
RATIO = torch.tensor([[1.5, 1.5, 0.5], [0.5, 7.0, 7.0]])
LOGPROBS = OLD + RATIO.log()
ADVANTAGES = torch.tensor([[2.0, -2.0, 2.0], [-2.0, math.nan, 9.0]])

surrogate = partial(clipped_surrogate, clip_range=0.2)
value_loss = partial(clipped_value_loss, value_clip_range=0.2)


def own_loss(new: torch.Tensor, old: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor):
    """A loss of the user's own, which looks at a whole row: the softplus of the row's mean log-ratio."""
    moved, target = torch.where(mask, new - old, 0), torch.where(mask, target, 0)
    mean = moved.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return custom_surrogate(-target * torch.nn.functional.softplus(mean + moved), new, old, mask, weights)


VARIANTS = {
    "surrogate": surrogate,
    "clip_higher": partial(surrogate, clip_range_high=0.28),
    "dual_clip": partial(surrogate, dual_clip=1.2),
    "log_ratio_clamp": partial(surrogate, log_ratio_clamp=0.1),
    "gspo": partial(gspo_surrogate, clip_range=0.2, clip_range_high=0.28),
    "cispo": partial(cispo_surrogate, clip_range_high=0.28),
    "own": own_loss,
    "value": value_loss,
    "value_unclipped": partial(clipped_value_loss, value_clip_range=None),
}


def test_surrogate_by_hand() -> None:
    # gain above 1.2 is held back: -2 * 1.2; loss is not: 2 * 1.5; gain falling is not: -2 * 0.5; loss below is: 2 * 0.8
    result = surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, WEIGHTS)
    assert float(result.loss) == pytest.approx((-2.4 + 3.0 - 1.0) / 8 + 1.6 / 4)
    assert float(result.clipped) == pytest.approx(1 / 8 + 1 / 4)
    assert float(result.dual_clipped) == 0
    torch.testing.assert_close(result.ratio, torch.where(MASK, RATIO, 1))
    up, down = math.log(1.5) ** 2 / 2, math.log(0.5) ** 2 / 2
    assert float(result.approx_kl) == pytest.approx((2 * up + down) / 8 + down / 4)
    assert float(result.kl) == pytest.approx(-(2 * math.log(1.5) + math.log(0.5)) / 8 - math.log(0.5) / 4)


def test_clip_higher_by_hand() -> None:
    result = surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, WEIGHTS, clip_range_high=0.4)
    assert float(result.loss) == pytest.approx((-2 * 1.4 + 3.0 - 1.0) / 8 + 1.6 / 4)


def test_dual_clip_by_hand() -> None:
    # of the two negative advantages, 2 * 1.5 exceeds 1.2 * 2, and 2 * 0.8 does not
    result = surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, WEIGHTS, dual_clip=1.2)
    assert float(result.loss) == pytest.approx((-2.4 + 2.4 - 1.0) / 8 + 1.6 / 4)
    assert float(result.dual_clipped) == pytest.approx(1 / 8)


def test_log_ratio_clamp_by_hand() -> None:
    # exp(0.1) and exp(-0.1) are within the clip range
    result = surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, WEIGHTS, log_ratio_clamp=0.1)
    up, down = math.exp(0.1), math.exp(-0.1)
    assert float(result.loss) == pytest.approx((-2 * up + 2 * up - 2 * down) / 8 + 2 * down / 4)
    overflow = torch.tensor([[800.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    held = surrogate(overflow, torch.zeros(2, 3), -ADVANTAGES, MASK, WEIGHTS, log_ratio_clamp=20.0)
    held.loss.backward()
    assert held.loss.isfinite() and overflow.grad is not None and overflow.grad.isfinite().all()


def test_importance_weighs_each_token() -> None:
    importance = torch.tensor([[0.5, 1.0, 2.0], [0.0, math.nan, math.nan]])
    result = surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, WEIGHTS, importance=importance)
    assert float(result.loss) == pytest.approx((-1.2 + 3.0 - 2.0) / 8)
    assert float(result.clipped) == pytest.approx(1 / 8 + 1 / 4)  # figures stay those of all tokens


def test_value_loss_by_hand() -> None:
    old_values = torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, 0.0]])
    values = torch.tensor([[1.1, 2.0, 2.0], [0.0, 5.0, math.nan]])
    returns = torch.tensor([[0.1, 0.2, 2.2], [1.0, 0.0, 0.0]])
    # errors 1, 1.8, -0.2, -1; held values 1.1, 1.2, 1.2, 0.8 have errors 1, 1, -1, -0.2; the larger square counts
    result = value_loss(values, old_values, returns, MASK, WEIGHTS)
    assert float(result.loss) == pytest.approx(0.5 * ((1 + 3.24 + 1) / 8 + 1 / 4))
    assert float(result.clipped) == pytest.approx(1 / 8)
    assert float(result.error) == pytest.approx((1 + 3.24 + 0.04) / 8 + 1 / 4)
    assert float(result.value) == pytest.approx(5.1 / 8)
    plain = clipped_value_loss(values, old_values, returns, MASK, WEIGHTS, value_clip_range=None)
    assert float(plain.loss) == pytest.approx(0.5 * ((1 + 3.24 + 0.04) / 8 + 1 / 4))
    assert float(plain.clipped) == 0


def test_gradient_is_the_plain_policy_gradient_before_anything_moved() -> None:
    logprobs = OLD.clone().requires_grad_()
    surrogate(logprobs, OLD, ADVANTAGES, MASK, torch.tensor([0.25, 0.25])).loss.backward()
    expected = [[-0.5, 0.5, -0.5], [0.5, 0.0, 0.0]]  # -A / 4, and nothing from the NaN outside the mask
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"cispo", "gspo"}))  # theirs: test_surrogates.py
@given(seed=st.integers(0, 2**31))
def test_gradients_agree_with_finite_differences(name: str, seed: int) -> None:
    function = VARIANTS[name]
    generator = torch.Generator().manual_seed(seed)
    noise, old, target = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    moved = 0.3 * noise
    kinks = [moved.exp() - 1.2, moved.exp() - 1.28, moved.exp() - 0.8, moved.abs() - 0.2, moved.abs() - 0.1]
    assume(min(float(kink.abs().min()) for kink in kinks) > 1e-4)  # at a kink there is no derivative
    new, weights = (old + moved).requires_grad_(), WEIGHTS.double()
    (gradient,) = torch.autograd.grad(function(new, old, target, MASK, weights).loss, new)
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 2)):
        step = torch.zeros_like(new)
        step[row, column] = 1e-6
        above, below = (float(function(new.detach() + d, old, target, MASK, weights).loss) for d in (step, -step))
        assert float(gradient[row, column]) == pytest.approx((above - below) / 2e-6, abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@given(split=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_parts_of_a_minibatch_add_up_to_the_whole(name: str, split: int, seed: int) -> None:
    function: Callable[..., object] = VARIANTS[name]
    generator = torch.Generator().manual_seed(seed)
    old, target, noise = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4)[None] < torch.randint(1, 5, (7, 1), generator=generator)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)

    def run(rows: slice) -> tuple[object, torch.Tensor]:
        new = (old[rows] + 0.3 * noise[rows]).requires_grad_()
        result = function(new, old[rows], target[rows], mask[rows], weights[rows])
        return result, torch.autograd.grad(result.loss, new)[0]

    whole, gradient = run(slice(None))
    parts = [run(slice(split)), run(slice(split, None))]
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=1e-15)
    for figure in (figure for figure in vars(whole) if figure != "ratio"):
        torch.testing.assert_close(sum(getattr(part, figure) for part, _ in parts), getattr(whole, figure))


@pytest.mark.parametrize("name", VARIANTS)
@given(seed=st.integers(0, 2**31), garbage=st.floats(width=32))
def test_what_lies_outside_the_mask_changes_nothing(name: str, seed: int, garbage: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    figures = torch.randn(3, 2, 3, generator=generator)
    soiled = torch.where(MASK, figures, garbage)
    results, gradients = [], []
    for old, target, moved in (figures, soiled):
        new = (old + 0.3 * moved).requires_grad_()
        results.append(VARIANTS[name](new, old, target, MASK, WEIGHTS))
        gradients.append(torch.autograd.grad(results[-1].loss, new)[0])
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(*gradients)
    assert gradients[1][~MASK].eq(0).all()


@pytest.mark.parametrize("function", [surrogate, value_loss])
def test_a_figure_that_would_broadcast_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 1\); it must be the mask's, \(2, 3\)"):
        function(LOGPROBS, OLD[:, :1], ADVANTAGES, MASK, WEIGHTS)
    with pytest.raises(ValueError, match=r"weights has shape \(2, 1\); it must be \[B\]"):
        function(LOGPROBS, OLD, ADVANTAGES, MASK, WEIGHTS[:, None])


def test_truncated_importance_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    old = torch.tensor([[-1.0, -1.0, -1.0, math.nan]], requires_grad=True)
    rollout = torch.tensor([[-1.0, -1.0 - math.log(3.0), -1.0 + math.log(4.0), 0.0]])
    weights = truncated_importance(old, rollout, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.25, 0.0]]))
    assert not weights.requires_grad


def test_a_cap_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="cap=0"):
        truncated_importance(torch.zeros(2, 3), torch.zeros(2, 3), MASK, cap=0)


@pytest.mark.parametrize(
    ("aggregation", "parts", "expected"),
    [
        ("token_mean", 2, [1 / 8, 1 / 8, 1 / 8, 1 / 8]),
        ("sequence_mean", 2, [1 / 4, 1 / 12, 1 / 8, 1 / 8]),
        ("microbatch_mean", 2, [1 / 8, 1 / 8, 1 / 8, 1 / 8]),  # both parts have four tokens
        ("microbatch_mean", 4, [1 / 4, 1 / 12, 1 / 8, 1 / 8]),  # one part per sequence
        ("microbatch_mean", 3, [1 / 12, 1 / 12, 1 / 6, 1 / 6]),  # the first part takes two
    ],
)
def test_token_weights_by_hand(aggregation: str, parts: int, expected: list[float]) -> None:
    weights = token_weights([1, 3, 2, 2], aggregation, parts)
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
