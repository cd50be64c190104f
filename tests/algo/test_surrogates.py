"""GSPO and CISPO against what the peers' own functions return, and their gradients against finite differences.

The peers: verl b178a3c, TRL f2cd577, OpenRLHF 3c3be62, SkyRL a956457, NeMo-RL 7ea279a, each run in float64.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppo_ray.algo.losses import token_weights
from ppo_ray.algo.surrogates import PolicyLoss, cispo_surrogate, clipped_surrogate, gspo_surrogate

LENGTHS = [3, 1, 2, 3]


def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([[*row, *[0.0] * (3 - len(row))] for row in rows], dtype=torch.float64)


MASK = torch.arange(3)[None] < torch.tensor(LENGTHS)[:, None]
OLD = padded([[-1.0, -2.0, -0.5], [-0.7], [-1.5, -0.3], [-0.2, -2.5, -1.0]])
NEW = padded([[-0.9, -2.4, -0.5], [-0.4], [-1.9, -0.2], [-0.3, -1.5, -1.1]])
ADVANTAGES = torch.tensor([[0.5], [-0.5], [-0.75], [0.75]], dtype=torch.float64).expand(4, 3)
TOKENS = token_weights(LENGTHS, "token_mean")
SEQUENCES = token_weights(LENGTHS, "sequence_mean")


def learn(function: Callable[..., PolicyLoss], weights: torch.Tensor, **options: float) -> tuple[PolicyLoss, list]:
    new = NEW.clone().requires_grad_()
    result = function(new, OLD, ADVANTAGES, MASK, weights, **options)
    (gradient,) = torch.autograd.grad(result.loss, new)
    assert gradient[~MASK].eq(0).all()
    return result, [row[:length].tolist() for row, length in zip(gradient, LENGTHS, strict=True)]


def close(found: list, wanted: list) -> None:
    for row, expected in zip(found, wanted, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


def test_gspo_is_that_of_verl_openrlhf_skyrl_and_nemo() -> None:
    result, gradient = learn(gspo_surrogate, SEQUENCES, clip_range=0.2, clip_range_high=0.28)
    assert result.ratio[:, 0].tolist() == pytest.approx([0.904837, 1.349859, 0.860708, 1.305605], abs=1e-6)
    assert float(result.loss) == pytest.approx(-0.02298958, abs=1e-8)
    close(gradient, [[-0.037702] * 3, [0.168732], [0.080691] * 2, [0.0] * 3])
    assert float(result.clipped) == pytest.approx(1 / 4)  # the last sequence, one of four


def test_gspo_with_narrow_limits() -> None:
    result, gradient = learn(gspo_surrogate, SEQUENCES, clip_range=0.03, clip_range_high=0.04)
    assert float(result.loss) == pytest.approx(0.04250267, abs=1e-8)
    close(gradient, [[-0.037702] * 3, [0.168732], [0.0] * 2, [0.0] * 3])


def test_cispo_is_trls_and_verls_without_a_lower_bound() -> None:
    result, gradient = learn(cispo_surrogate, TOKENS, clip_range_high=0.28)
    assert float(result.loss) == pytest.approx(0.28497873, abs=1e-8)
    wanted = [[-0.061398, -0.037240, -0.055556], [0.071111], [0.055860, 0.092098], [-0.075403, -0.106667, -0.075403]]
    close(gradient, wanted)
    assert float(result.clipped) == pytest.approx(2 / 9)  # 1.35 and 2.72, whatever the advantage's sign


def test_the_clipped_surrogate_is_verls() -> None:
    result, gradient = learn(clipped_surrogate, TOKENS, clip_range=0.2, clip_range_high=0.28)
    assert float(result.loss) == pytest.approx(-0.17791045, abs=1e-8)
    wanted = [[-0.061398, -0.037240, -0.055556], [0.074992], [0.0, 0.092098], [-0.075403, 0.0, -0.075403]]
    close(gradient, wanted)


def test_a_tokens_own_advantage_weighs_its_gradient_in_gspo() -> None:
    new = NEW.clone().requires_grad_()
    advantages = padded([[1.0, 2.0, -3.0], [1.0], [0.0, 1.0], [0.5, 0.5, 0.5]])
    loss = gspo_surrogate(new, OLD, advantages, MASK, torch.ones(4, dtype=torch.float64), clip_range=10.0).loss
    (gradient,) = torch.autograd.grad(loss, new)
    ratios = torch.tensor([[0.904837], [1.349859], [0.860708], [1.305605]], dtype=torch.float64)
    torch.testing.assert_close(gradient, -advantages * ratios * MASK, atol=1e-5, rtol=0)


def test_a_clamp_keeps_gspo_finite() -> None:
    new = torch.full_like(NEW, 800.0).requires_grad_()
    loss = gspo_surrogate(new, OLD, -ADVANTAGES, MASK, SEQUENCES, clip_range=0.2, log_ratio_clamp=20.0).loss
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and gradient.isfinite().all()


@given(seed=st.integers(0, 2**31))
def test_gradients_of_gspo_agree_with_finite_differences(seed: int) -> None:
    """Where a sequence has one advantage the loss is the sequence's own function."""
    generator = torch.Generator().manual_seed(seed)
    noise, old = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, 1, generator=generator, dtype=torch.float64).expand(4, 3)
    moved = torch.where(MASK, 0.3 * noise, 0)
    ratio = (moved.sum(1) / MASK.sum(1)).exp()
    assume(min(float((ratio - kink).abs().min()) for kink in (0.8, 1.28)) > 1e-4)

    def loss(new: torch.Tensor) -> torch.Tensor:
        return gspo_surrogate(new, old, advantages, MASK, SEQUENCES, clip_range=0.2, clip_range_high=0.28).loss

    check_slopes(loss, loss, old + moved)


@given(seed=st.integers(0, 2**31))
def test_gradients_of_cispo_agree_with_finite_differences_of_its_weighted_log_likelihood(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, old, advantages = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    held = (0.3 * noise).exp().clamp(max=1.28)

    def likelihood(new: torch.Tensor) -> torch.Tensor:
        return (TOKENS[:, None] * torch.where(MASK, -held * advantages * new, 0)).sum()

    def loss(new: torch.Tensor) -> torch.Tensor:
        return cispo_surrogate(new, old, advantages, MASK, TOKENS, clip_range_high=0.28).loss

    check_slopes(loss, likelihood, old + 0.3 * noise)


def check_slopes(
    loss: Callable[[torch.Tensor], torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor
) -> None:
    """Compare the gradient of a loss with the slopes of a value."""
    new = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(new), new)
    for row, column in MASK.nonzero().tolist():
        step = torch.zeros_like(new)
        step[row, column] = 1e-6
        slope = (float(value(at + step)) - float(value(at - step))) / 2e-6
        assert float(gradient[row, column]) == pytest.approx(slope, abs=1e-5)
