"""Invented runs, small enough to work out by hand."""

from collections.abc import Sequence

from benchmarks.compare.arms import ArmRun, Step

LENGTHS = [(2, 3), (3, 1)]


def make_step(total_s: float = 10.0, sync: float = 0.5, score: float = 1.0, mismatch: float | None = None) -> Step:
    """Of which 4 s are generation, 0.25 s scoring, 1 s forward passes and 2 s the update."""
    seconds = {"generation": 4.0, "scoring": 0.25, "forward": 1.0, "update": 2.0, "sync": sync}
    figures = {"score": score, "kl": 2 * score, "policy_loss": -0.1, "value_loss": 0.5}
    return Step(seconds, total_s, LENGTHS, figures, mismatch)


def make_run(
    arm: str,
    seed: int,
    totals: Sequence[float],
    score: float = 1.0,
    peak_mib: float = 1000.0,
    mismatch: float | None = None,
) -> ArmRun:
    """Make a run whose steps take so many seconds."""
    sync = 0.5 if arm == "ppo-ray" else 0.0
    steps = [make_step(total_s, sync, score, mismatch) for total_s in totals]
    return ArmRun(arm, seed, steps, peak_mib, {"python 1": peak_mib})
