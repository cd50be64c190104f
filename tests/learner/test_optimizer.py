import pytest

from ppo_ray.learner.optimizer import learning_rate_factor


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
