import math

import pytest
import torch

from ppo_ray.algo.importance import truncated_importance

MASK = torch.tensor([[True, True, True, False]])


def test_weights_by_hand() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0, math.nan]], requires_grad=True)
    rollout = torch.tensor([[-1.0, -1.0 - math.log(3.0), -1.0 + math.log(4.0), 0.0]])
    weights = truncated_importance(old, rollout, MASK, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.25, 0.0]]))
    assert not weights.requires_grad


def test_a_cap_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="cap=0"):
        truncated_importance(torch.zeros(1, 4), torch.zeros(1, 4), MASK, cap=0)
