"""What lies outside the healthy ranges, and when it is said."""

import math

import pytest

from ppo_ray.run.health import HEALTHY, HealthCheck, Range

WELL = {"policy/approx_kl": 0.01, "policy/clip_fraction": 0.1, "kl/per_sequence": 1.0, "policy/optimizer_steps": 4.0}


def make_history(*kls: float) -> list[dict[str, float]]:
    return [{"step": step} | WELL | {"policy/approx_kl": kl} for step, kl in enumerate(kls)]


def test_ranges_hold_their_limits_and_no_nan() -> None:
    healthy = Range(0.5, 1.5, "")
    values = (0.5, 1.5, 0.49, 1.51, math.nan)
    assert [healthy.holds(value) for value in values] == [True, True, False, False, False]
    assert [str(Range(*limits, "")) for limits in ((0.5, 1.5), (-math.inf, 2), (3, math.inf))] == [
        "0.5 to 1.5",
        "at most 2",
        "at least 3",
    ]


def test_what_lies_outside_is_named() -> None:
    find_outside = HealthCheck().find_outside
    assert find_outside({"step": 3} | WELL) == []
    assert find_outside({"step": 3} | WELL | {"policy/approx_kl": 0.5, "kl/per_sequence": 99.0}) == [
        "policy/approx_kl",
        "kl/per_sequence",
    ]
    assert find_outside({"step": 3}) == []


@pytest.mark.parametrize(
    ("loss", "outside"),
    [
        ("clip", ["policy/clip_fraction"]),
        ("cispo", ["policy/clip_fraction"]),
        ("gspo", ["policy/ratio_max"]),  # of sequences: they do not go that far, and most are held
        ("my.losses:sapo", []),
    ],
)
def test_the_ranges_are_those_of_the_loss(loss: str, outside: list[str]) -> None:
    metrics = {"step": 3.0} | WELL | {"policy/clip_fraction": 0.5, "policy/ratio_max": 4.0, "policy/ratio_min": 0.6}
    assert HealthCheck(loss).find_outside(metrics) == outside
    assert HealthCheck(loss).find_outside(metrics | {"policy/approx_kl": 0.5})[0] == "policy/approx_kl"


@pytest.mark.parametrize("change", [{"policy/optimizer_steps": 1.0}, {"step": 1.0}])
def test_the_policys_move_is_not_judged_where_it_does_not_move(change: dict[str, float]) -> None:
    check = HealthCheck(value_warmup_steps=2)
    far = {"step": 3} | WELL | {"policy/approx_kl": 0.3}
    assert check.find_outside(far) == ["policy/approx_kl"]
    assert check.find_outside(far | change) == []


def test_a_policy_with_nothing_left_to_learn_is_healthy() -> None:
    assert HealthCheck().find_outside({"step": 3} | WELL | {"policy/approx_kl": 0.0}) == []


def test_the_mismatch_of_older_weights_is_not_judged() -> None:
    assert HealthCheck().find_outside({"step": 1, "mismatch/kl": 0.5}) == ["mismatch/kl"]
    assert HealthCheck().find_outside({"step": 1, "mismatch/kl": 0.5, "rollout/staleness_max": 1}) == []


def test_a_warning_comes_when_a_figure_leaves_its_range_and_not_at_every_step() -> None:
    history = make_history(0.01, 0.2, 0.01, 0.3, *[0.01] * 5, 0.4)
    said = {step for step in range(len(history)) for _ in HealthCheck().find_warnings(history[: step + 1])}
    assert said == {1, 9}
    (line,) = HealthCheck().find_warnings(history[:2])
    limits = HEALTHY["policy/approx_kl"]
    assert line.startswith(f"warning: step 1: policy/approx_kl is 0.2, its healthy range is {limits}; ")


def test_the_whole_run_is_summed_up() -> None:
    assert HealthCheck().describe(make_history(0.01, 0.01)) == "2 of 2 steps within all healthy ranges"
    summary = HealthCheck(value_warmup_steps=1).describe(make_history(0.7, 0.9, 0.01, 0.8))
    limits = HEALTHY["policy/approx_kl"]
    assert summary == f"2 of 4 steps within all healthy ranges; policy/approx_kl outside its range ({limits}) in 2"
