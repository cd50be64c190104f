import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppo_ray.config import UpdateConfig
from ppo_ray.learner.offload import Offload
from ppo_ray.learner.optimizer import learning_rate_factor, make_adam


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 1, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_warm_up_of_two_steps_and_four_to_fall_by_hand(schedule: str, expected: list[float]) -> None:
    found = [learning_rate_factor(step, 6, schedule, warmup_steps=2, final_factor=0.2) for step in range(7)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_run_that_goes_on_stays_at_the_end_of_its_schedule() -> None:
    assert learning_rate_factor(100, 6, "linear") == 0
    assert learning_rate_factor(0, 1, "cosine") == 1


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule='step'; it must be constant, linear or cosine"):
        learning_rate_factor(1, 6, "step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_is_there_at_once_and_is_what_torch_would_make(dtype: torch.dtype) -> None:
    """The policy's parameter has no gradient in the first two steps, as in the values' warm-up."""
    torch.manual_seed(0)
    policy, values = (torch.nn.Parameter(torch.randn(3, 4, dtype=dtype)) for _ in range(2))
    actor_critic: Any = SimpleNamespace(policy_parameters=lambda: [policy], value_parameters=lambda: [values])
    sharding: Any = SimpleNamespace(optimized_parameters=list)
    ours = make_adam(actor_critic, sharding, UpdateConfig(learning_rate=0.1), Offload())
    assert sum(tensor.nbytes for state in ours.state.values() for tensor in state.values()) == 4 * policy.nbytes + 8

    copies = [copy.deepcopy(parameter) for parameter in (policy, values)]
    lazy = torch.optim.Adam(copies, lr=0.1, fused=True)
    for step in range(4):
        for mine, other in zip((policy, values), copies, strict=True):
            mine.grad = other.grad = None if step < 2 and mine is policy else torch.randn(3, 4, dtype=dtype)
        ours.step()
        lazy.step()
    for mine, other in zip((policy, values), copies, strict=True):
        assert mine.tolist() == other.tolist()
        assert ours.state[mine].keys() == lazy.state[other].keys()
        for name, tensor in lazy.state[other].items():
            found = ours.state[mine][name]
            assert (found.tolist(), found.dtype, found.shape) == (tensor.tolist(), tensor.dtype, tensor.shape)
