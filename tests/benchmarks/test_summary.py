import pytest

from benchmarks.compare import summary
from benchmarks.compare.findings import Findings, Task, find
from benchmarks.compare.machine import Machine
from benchmarks.flops import DecoderShape
from tests.benchmarks.runs import make_run

SHAPE = DecoderShape(layers=1, hidden=1, intermediate=0, query_width=1, key_width=0, vocab=5)
# parameters 2; (2, 3): 2 x 2 x 4 + 4 x 10 + 10 x 3 = 86; (3, 1): 2 x 2 x 3 + 4 x 6 + 10 = 46; both: 132 a pass
MACHINE = Machine(update_flops=1000.0, decode_flops=100.0, large_flops=2000.0, copy_bytes=50.0)

ROUNDS = {
    "trl": [make_run("trl", 0, [99, 40, 40, 60], 1.0), make_run("trl", 1, [99, 20, 20, 20], 1.4)],
    "ppo-ray": [
        make_run("ppo-ray", 0, [99, 10, 10, 9], 1.1, peak_mib=2000),
        make_run("ppo-ray", 1, [99, 8, 8, 8], 1.5, peak_mib=3000),
    ],
}
TASK = Task(SHAPE, epochs=4, weight_bytes=5.0, copies=3)


@pytest.fixture
def found() -> Findings:
    return find(ROUNDS, [MACHINE, MACHINE], TASK)


def test_the_first_step_is_in_no_time_and_what_is_in_no_phase_is_other(found):
    # steps of 10, 10, 9, 8, 8, 8 s, each with 7.75 s of known phases
    assert found.seconds["ppo-ray"] == {
        **{"generation": 4.0, "scoring": 0.25, "forward": 1.0, "update": 2.0, "sync": 0.5, "other": 0.75},
        "total": 8.5,
    }


def test_arms_are_compared_within_a_round(found):
    # round 0: 40 s to 10 s; round 1: 20 s to 8 s
    assert found.speedups == {"trl": summary.Spread(3.25, 2.5, 4.0)}
    assert found.samples_per_second["ppo-ray"] == summary.Spread(pytest.approx(0.225), 0.2, 0.25)


def test_shares_of_the_machine(found):
    shares = found.shares["ppo-ray"]
    assert shares["generation"] == pytest.approx(132 / 4 / 1000)
    assert shares["generation_of_decode"] == pytest.approx(132 / 4 / 100)
    assert shares["update"] == pytest.approx(12 * 132 / 2 / 1000)
    assert shares["learning"] == pytest.approx(13 * 132 / 3 / 1000)
    assert found.sync_of_copy == pytest.approx(15 / 0.5 / 50)


def test_overhead_and_sync_are_shares_of_each_step(found):
    # other: 2.25 / 10 twice, 1.25 / 9, 0.25 / 8 three times
    assert found.overhead["ppo-ray"] == pytest.approx((1.25 / 9 + 0.25 / 8) / 2)
    assert found.overhead_at_most == pytest.approx((1.5 / 9 + 0.5 / 8) / 2)
    assert found.sync_of_step == pytest.approx((0.5 / 9 + 0.5 / 8) / 2)


def test_a_difference_is_judged_by_the_spread_of_the_seeds(found):
    agreement = found.agreements["trl"]["score"]
    assert agreement.means == pytest.approx((1.3, 1.2))
    assert agreement.spread == pytest.approx(0.8)
    assert agreement.agrees and summary.Agreement((1.3, 0.51), agreement.deviations).agrees
    assert not summary.Agreement((1.3, 0.49), agreement.deviations).agrees


def test_one_seed_has_no_spread():
    rounds = {arm: runs[:1] for arm, runs in ROUNDS.items()}
    found = summary.agreement(rounds, "ppo-ray", "trl", "kl")
    assert found.agrees is None and found.difference == pytest.approx(0.2)


def test_what_is_asked_for_is_met_or_not(found):
    met = {what: met for what, _, _, met in found.requirements()}
    assert met == {
        "samples per second, over TRL, one prompt per call": True,
        "forward passes and update, of the matrix rate": False,
        "overhead, of a step": False,
        "weight sync, of a step": False,
        "peak memory, over TRL's": False,
        "same algorithm as TRL, one prompt per call": True,
    }


def test_bfloat16_is_compared_with_float32():
    bfloat16 = [make_run("ppo-ray-bf16", 0, [99, 5, 5, 5], mismatch=2e-3), make_run("ppo-ray-bf16", 1, [99, 4, 4, 4])]
    found = find({**ROUNDS, "ppo-ray-bf16": bfloat16}, [MACHINE, MACHINE], TASK)
    assert found.bfloat16_speedup == summary.Spread(2.0, 2.0, 2.0)
    assert found.speedups["ppo-ray-bf16"].median == 0.5 and found.mismatch == {"ppo-ray-bf16": 2e-3}
    met = {what: met for what, _, _, met in found.requirements()}
    assert met["samples per second in bfloat16, over float32"] is True


def test_without_ppo_ray_there_is_nothing_to_ask_for():
    alone = find({"trl": ROUNDS["trl"]}, [MACHINE, MACHINE], TASK)
    assert (alone.requirements(), alone.speedups, alone.sync_of_copy) == ([], {}, None)
