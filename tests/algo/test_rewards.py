import math

import pytest
import torch

from ppo_ray.algo.rewards import token_rewards

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
