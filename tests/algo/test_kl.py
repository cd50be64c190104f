import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_ray.algo.kl import AdaptiveKLController, FixedKLController, kl_estimate
from ppo_ray.algo.masked import masked_whiten
from ppo_ray.algo.rewards import gae, token_rewards

LOGPROBS = torch.tensor([[-1.0, -2.0, math.nan]])
REF_LOGPROBS = torch.tensor([[-1.5, -0.5, 3.0]])  # log-ratios 0.5 and -1.5
MASK = torch.tensor([[True, True, False]])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -1.5]),
        ("k2", [0.125, 1.125]),
        ("k3", [0.1065307, 1.9816891]),  # e^-0.5 - 0.5, e^1.5 - 2.5
        ("abs", [0.5, 1.5]),
    ],
)
def test_estimates_by_hand(estimator: str, expected: list[float]) -> None:
    found = kl_estimate(LOGPROBS, REF_LOGPROBS, MASK, estimator)
    torch.testing.assert_close(found, torch.tensor([[*expected, 0.0]]))


def test_a_clamp_bounds_the_estimate_and_ends_the_gradient() -> None:
    """The values are verl's, which clamps at 10 always."""
    ref = torch.zeros(1, 4)
    mask = torch.ones(1, 4, dtype=torch.bool)
    logprobs = torch.tensor([[-6.0, -2.0, -89.5, 12.0]], requires_grad=True)
    plain = kl_estimate(logprobs, ref, mask, "k3")
    torch.testing.assert_close(plain[0, :2], torch.tensor([396.428793, 4.389056]))
    clamped = kl_estimate(logprobs, ref, mask, "k3", clamp=10)
    torch.testing.assert_close(clamped, torch.tensor([[10.0, 4.389056, 10.0, 10.0]]))
    (gradient,) = torch.autograd.grad(clamped.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1 - math.exp(2), 0.0, 0.0]]))
    torch.testing.assert_close(kl_estimate(logprobs, ref, mask, "k1", clamp=10)[0, 2:], torch.tensor([-10.0, 10.0]))


def test_one_unlikely_token_leaves_the_other_advantages_their_spread() -> None:
    logprobs, ref = torch.zeros(2, 64, 128)
    logprobs[0, 0] = -12
    mask = torch.ones(64, 128, dtype=torch.bool)
    scores = torch.linspace(-1, 1, 64)

    def spread(clamp: float | None) -> float:
        kl = kl_estimate(logprobs, ref, mask, "k3", clamp)
        rewards = token_rewards(kl, scores, mask, 0.05)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
        return float(masked_whiten(advantages, mask)[1:].std())

    assert spread(None) < 0.01 and spread(10) > 0.9


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator='k4'"):
        kl_estimate(LOGPROBS, REF_LOGPROBS, MASK, "k4")


@given(st.integers(0, 2**31))
def test_k1_and_k3_are_right_on_average_and_k2_has_the_right_gradient(seed: int) -> None:
    """Over a small vocabulary averages are sums: nothing is sampled."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, logq = logits.log_softmax(0), ref_logits.log_softmax(0)
    divergence = (logp.exp() * (logp - logq)).sum()
    mask = torch.ones(1, 5, dtype=torch.bool)

    def average(estimator: str) -> torch.Tensor:
        return (logp.detach().exp() * kl_estimate(logp[None], logq[None], mask, estimator)[0]).sum()

    for estimator in ("k1", "k3"):
        torch.testing.assert_close(average(estimator), divergence)
    wanted = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(average("k2"), logits, retain_graph=True)[0], wanted)
    nothing = torch.autograd.grad(average("k1"), logits)[0]  # as a loss k1 teaches nothing
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@given(seed=st.integers(0, 2**31))
def test_gradients_agree_with_finite_differences(estimator: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new, ref = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    if float((new - ref).abs().min()) < 1e-3:
        return  # at the kink of |d| there is no derivative
    new.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_estimate(new, ref, mask, estimator).sum(), new)
    for column in range(3):
        step = torch.zeros_like(new)
        step[0, column] = 1e-6
        above, below = (float(kl_estimate(new.detach() + d, ref, mask, estimator).sum()) for d in (step, -step))
        assert float(gradient[0, column]) == pytest.approx((above - below) / 2e-6, abs=1e-5)


@pytest.mark.parametrize(
    ("kl", "num_sequences", "expected"),
    [
        (6.0, 128, 0.2),  # on target
        (6.6, 100, 0.2 * (1 + 0.1 * 0.01)),  # 10% above
        (60.0, 100, 0.2 * (1 + 0.2 * 0.01)),  # far above: held at 20%
        (-3.0, 1000, 0.2 * (1 - 0.2 * 0.1)),  # negative estimate: held at -20%
        (math.nan, 1000, 0.2),  # says nothing
    ],
)
def test_adaptive_controller_by_hand(kl: float, num_sequences: int, expected: float) -> None:
    controller = AdaptiveKLController(kl_coef=0.2, target=6.0, horizon=10000.0)
    assert controller.adapt(kl, num_sequences).kl_coef == pytest.approx(expected, rel=1e-12)
    assert controller.kl_coef == 0.2  # a new controller is returned, this one stays


def test_fixed_controller_stays() -> None:
    assert FixedKLController(0.05).adapt(100.0, 128) == FixedKLController(0.05)
