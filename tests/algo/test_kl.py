import math

import pytest
import torch

from ppo_ray.algo.kl import AdaptiveKLController, FixedKLController, kl_estimate


def test_estimate_is_the_log_ratio_and_may_be_negative() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]])
    ref_logprobs = torch.tensor([[-1.5, -0.5, 3.0]])
    mask = torch.tensor([[True, True, False]])
    assert kl_estimate(logprobs, ref_logprobs, mask).tolist() == [[0.5, -1.5, 0.0]]


@pytest.mark.parametrize(
    ("kl", "num_sequences", "expected"),
    [
        (6.0, 128, 0.2),  # on target
        (6.6, 100, 0.2 * (1 + 0.1 * 0.01)),  # 10% above
        (60.0, 100, 0.2 * (1 + 0.2 * 0.01)),  # far above: held at 20%
        (-3.0, 1000, 0.2 * (1 - 0.2 * 0.1)),  # negative estimate: held at -20%
    ],
)
def test_adaptive_controller_by_hand(kl: float, num_sequences: int, expected: float) -> None:
    controller = AdaptiveKLController(kl_coef=0.2, target=6.0, horizon=10000.0)
    assert controller.updated(kl, num_sequences).kl_coef == pytest.approx(expected, rel=1e-12)
    assert controller.kl_coef == 0.2  # a new controller is returned, this one stays


def test_fixed_controller_stays() -> None:
    assert FixedKLController(0.05).updated(100.0, 128) == FixedKLController(0.05)
