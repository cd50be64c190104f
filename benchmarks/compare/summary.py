"""What the runs say: medians, ratios within a round, shares of the machine, and whether the algorithms agree."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.compare.arms import FIGURES, PHASES, ArmRun, Step
from benchmarks.compare.machine import Machine
from benchmarks.flops import DecoderShape, forward_flops, update_flops

WARM_UP_STEPS = 1
"""First steps of each run, in no time: what is allocated, compiled and read for the first time."""

Rounds = Mapping[str, Sequence[ArmRun]]
"""By arm: a run for each round, in the order of the rounds."""


@dataclass(frozen=True)
class Spread:
    """A median, and the least and the largest over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Sum values up."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Agreement:
    """Whether a figure of two arms is the same but for the seeds' noise."""

    means: tuple[float, float]
    """Over steps and seeds."""
    deviations: tuple[float, float]
    """Of the seeds' means; NaN with one seed."""

    @property
    def difference(self) -> float:
        """Of the means."""
        return self.means[0] - self.means[1]

    @property
    def spread(self) -> float:
        """By how much single runs differ by their seeds alone, in 19 of 20 cases: two standard deviations of that."""
        return 2 * math.hypot(*self.deviations)

    @property
    def agrees(self) -> bool | None:
        """Whether the difference lies within the spread; None where there is none."""
        return None if math.isnan(self.spread) else abs(self.difference) <= self.spread


def steps_to_count(run: ArmRun) -> list[Step]:
    """Return the steps whose seconds count."""
    return run.steps[WARM_UP_STEPS:]


def phase_medians(runs: Sequence[ArmRun]) -> dict[str, float]:
    """Return the median seconds of each phase, and of the whole step (`total`), over all steps of all rounds."""
    steps = [step for run in runs for step in steps_to_count(run)]
    found = {phase: statistics.median(step.phases[phase] for step in steps) for phase in PHASES}
    return found | {"total": statistics.median(step.total_s for step in steps)}


def samples_per_second(run: ArmRun) -> float:
    """Return a run's samples per second: the batch over the median step."""
    steps = steps_to_count(run)
    return len(steps[0].lengths) / statistics.median(step.total_s for step in steps)


def speedup(rounds: Rounds, arm: str, other: str) -> Spread:
    """Return how many times faster an arm is than another, compared within each round."""
    pairs = zip(rounds[arm], rounds[other], strict=True)
    return Spread.of([samples_per_second(ours) / samples_per_second(theirs) for ours, theirs in pairs])


def share_of_step(runs: Sequence[ArmRun], *phases: str) -> float:
    """Return the median share of phases in a step, over all steps of all rounds."""
    steps = [step for run in runs for step in steps_to_count(run)]
    return statistics.median(sum(step.phases[phase] for phase in phases) / step.total_s for step in steps)


def mismatch(runs: Sequence[ArmRun]) -> float | None:
    """Return the median KL between engine and learner, nats per token, over all steps of all rounds, if it is known."""
    found = [step.mismatch for run in runs for step in run.steps if step.mismatch is not None]
    return statistics.median(found) if found else None


def shares_of_machine(
    runs: Sequence[ArmRun], machines: Sequence[Machine], shape: DecoderShape, epochs: int
) -> dict[str, float]:
    """Return what share of the machine's matrix rate each part reaches, the median over all steps of all rounds.

    Each round's steps are compared with that round's measurement. `generation_of_decode` is against products of one
    token per sequence. `learning` is forward passes and update together, against what the algorithm needs at least: the
    reference's forward pass and the epochs; the first epoch's forward pass knows the old log-probabilities.
    """
    found: dict[str, list[float]] = {}
    for run, machine in zip(runs, machines, strict=True):
        for step in steps_to_count(run):
            once, epochs_flops = forward_flops(shape, step.lengths), update_flops(shape, step.lengths, epochs)
            seconds, peak = step.seconds, machine.update_flops
            reached = {
                "generation": once / seconds["generation"] / peak,
                "generation_of_decode": once / seconds["generation"] / machine.decode_flops,
                "update": epochs_flops / seconds["update"] / peak,
                "learning": (once + epochs_flops) / (seconds["forward"] + seconds["update"]) / peak,
            }
            for name, share in reached.items():
                found.setdefault(name, []).append(share)
    return {name: statistics.median(shares) for name, shares in found.items()}


def sync_share(runs: Sequence[ArmRun], machines: Sequence[Machine], num_bytes: float) -> float:
    """Return what share of the machine's copy rate a weight sync reaches, if so many bytes must be copied."""
    pairs = zip(runs, machines, strict=True)
    return statistics.median(
        num_bytes / step.seconds["sync"] / machine.copy_bytes for run, machine in pairs for step in steps_to_count(run)
    )


def agreement(rounds: Rounds, arm: str, other: str, figure: str) -> Agreement:
    """Compare a figure of two arms: each seed's mean over all steps."""
    means, deviations = [], []
    for name in (arm, other):
        seeds = [statistics.fmean(step.figures[figure] for step in run.steps) for run in rounds[name]]
        means.append(statistics.fmean(seeds))
        deviations.append(statistics.stdev(seeds) if len(seeds) > 1 else math.nan)
    return Agreement((means[0], means[1]), (deviations[0], deviations[1]))


def agreements(rounds: Rounds, arm: str) -> dict[str, dict[str, Agreement]]:
    """Compare all figures of an arm with every other's, by arm and figure."""
    others = [other for other in rounds if other != arm]
    return {other: {figure: agreement(rounds, arm, other, figure) for figure in FIGURES} for other in others}
