"""Everything that the rounds say, worked out once, for the tables, the JSON and the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare import summary
from benchmarks.compare.arms import ARMS, FIGURES, OURS, OURS_BFLOAT16
from benchmarks.compare.machine import Machine
from benchmarks.compare.summary import Agreement, Rounds, Spread
from benchmarks.flops import DecoderShape

LEAST_SPEEDUP = {"trl": (3.0, 5.0), "trl-batched": (1.5, 2.5)}
"""How many times faster ppo_ray must be at least, and is meant to be."""
LEAST_SPEEDUP_BFLOAT16 = 1.6
MOST_MEMORY = 1.5
"""How many times TRL's peak ppo_ray may have at most."""


@dataclass(frozen=True)
class Task:
    """What must be known of the task to judge the runs."""

    shape: DecoderShape
    epochs: int
    weight_bytes: float
    """Of the policy."""
    copies: int
    """How often a weight sync must copy it at least: out of the learner, and into each engine."""


@dataclass(frozen=True)
class Findings:
    """The medians of a benchmark."""

    seconds: dict[str, dict[str, float]]
    """By arm and phase."""
    samples_per_second: dict[str, Spread]
    speedups: dict[str, Spread]
    """Of ppo_ray over each other arm."""
    bfloat16_speedup: Spread | None
    """Of ppo_ray in bfloat16 over itself in float32."""
    mismatch: dict[str, float]
    """Median KL between engine and learner, nats per token, of the arms that have both."""
    peak_mib: dict[str, Spread]
    shares: dict[str, dict[str, float]]
    """Of the machine, by arm and part."""
    sync_of_copy: float | None
    overhead: dict[str, float]
    """Share of a step, by arm."""
    overhead_at_most: float | None
    """ppo_ray's, if all scoring went on while others still generated and so took no time of its own."""
    sync_of_step: float | None
    agreements: dict[str, dict[str, Agreement]]

    def requirements(self) -> list[tuple[str, str, str, bool | None]]:
        """Return what ppo_ray is asked for: what, the limit, what was found, and whether it is met."""
        if OURS not in self.seconds:
            return []
        rows: list[tuple[str, str, str, bool | None]] = []
        for arm, (least, goal) in LEAST_SPEEDUP.items():
            if (speedup := self.speedups.get(arm)) is None:
                continue
            limit = f"at least {least:g} times (goal: {goal:g})"
            rows.append(
                (f"samples per second, over {ARMS[arm]}", limit, f"{speedup.median:.2f}", speedup.median >= least)
            )
        if (speedup := self.bfloat16_speedup) is not None:
            limit, found = f"at least {LEAST_SPEEDUP_BFLOAT16:g} times", f"{speedup.median:.2f}"
            met = speedup.median >= LEAST_SPEEDUP_BFLOAT16
            rows.append(("samples per second in bfloat16, over float32", limit, found, met))
        learning, least, most = self.shares[OURS]["learning"], self.overhead[OURS], self.overhead_at_most or 0.0
        rows.append(
            ("forward passes and update, of the matrix rate", "at least 70%", f"{learning:.0%}", learning >= 0.7)
        )
        rows.append(("overhead, of a step", "below 5%", f"{least:.1%} to {most:.1%}", most < 0.05))
        sync = self.sync_of_step or 0.0
        rows.append(("weight sync, of a step", "below 5%", f"{sync:.1%}", sync < 0.05))
        if "trl" in self.peak_mib:
            ratio = self.peak_mib[OURS].median / self.peak_mib["trl"].median
            limit = f"at most {MOST_MEMORY:g} times"
            rows.append(("peak memory, over TRL's", limit, f"{ratio:.2f}", ratio <= MOST_MEMORY))
        for arm, figures in self.agreements.items():
            known = [found.agrees for found in figures.values()]
            apart = [FIGURES[name] for name, found in figures.items() if found.agrees is False]
            met = None if None in known else not apart
            rows.append(
                (
                    f"same algorithm as {ARMS[arm]}",
                    "within the seeds' spread",
                    ", ".join(apart) or ("all" if met else "-"),
                    met,
                )
            )
        return rows


def find(rounds: Rounds, machines: Sequence[Machine], task: Task) -> Findings:
    """Work it all out; every arm has a run for each machine."""
    has_ours = OURS in rounds
    others = [arm for arm in rounds if arm != OURS and has_ours]
    sync = task.copies * task.weight_bytes
    return Findings(
        seconds={arm: summary.phase_medians(runs) for arm, runs in rounds.items()},
        samples_per_second={
            arm: Spread.of([summary.samples_per_second(run) for run in runs]) for arm, runs in rounds.items()
        },
        speedups={arm: summary.speedup(rounds, OURS, arm) for arm in others},
        bfloat16_speedup=summary.speedup(rounds, OURS_BFLOAT16, OURS) if OURS_BFLOAT16 in others else None,
        mismatch={arm: found for arm, runs in rounds.items() if (found := summary.mismatch(runs)) is not None},
        peak_mib={arm: Spread.of([run.peak_mib for run in runs]) for arm, runs in rounds.items()},
        shares={
            arm: summary.shares_of_machine(runs, machines, task.shape, task.epochs) for arm, runs in rounds.items()
        },
        sync_of_copy=summary.sync_share(rounds[OURS], machines, sync) if has_ours else None,
        overhead={arm: summary.share_of_step(runs, "other") for arm, runs in rounds.items()},
        overhead_at_most=summary.share_of_step(rounds[OURS], "other", "scoring") if has_ours else None,
        sync_of_step=summary.share_of_step(rounds[OURS], "sync") if has_ours else None,
        agreements=summary.agreements(rounds, OURS) if has_ours else {},
    )


def to_json(found: Agreement) -> dict[str, Any]:
    """Write an agreement out, with what follows from it."""
    return {
        "means": found.means,
        "deviations": found.deviations,
        "difference": found.difference,
        "spread": found.spread,
        "agrees": found.agrees,
    }
