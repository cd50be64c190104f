"""The report: tables for people, JSON for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.compare.arms import ARMS, FIGURES, OURS, PHASES
from benchmarks.compare.findings import Findings, to_json
from benchmarks.compare.machine import Machine
from benchmarks.compare.summary import WARM_UP_STEPS, Rounds, Spread
from ppo_ray import atomic

_MARK = {True: "yes", False: "NO", None: "one seed: unknown"}


def tables(found: Findings, machines: Sequence[Machine]) -> list[Table]:
    """Make the tables, in the order of the report."""
    made = [_time_table(found), _machine_table(found, machines)]
    if found.agreements:
        made += [_agreement_table(found), _requirement_table(found)]
    return made


def show(found: Findings, machines: Sequence[Machine], console: Console, markdown: Path) -> None:
    """Print the tables, and write them as Markdown."""
    with markdown.open("w", encoding="utf-8") as file:
        paper = Console(file=file, width=200, color_system=None)
        for table in tables(found, machines):
            console.print(table)
            title, caption = table.title, table.caption
            table.box, table.title, table.caption = box.MARKDOWN, None, None
            paper.print(f"## {title}", table, f"\n{caption or ''}\n", sep="\n")


def write(found: Findings, rounds: Rounds, machines: Sequence[Machine], about: Mapping[str, Any], path: Path) -> None:
    """Write the findings, and every step that they are of, as JSON."""
    fields = asdict(found) | {
        "agreements": {
            arm: {figure: to_json(agreement) for figure, agreement in figures.items()}
            for arm, figures in found.agreements.items()
        },
        "requirements": [
            dict(zip(("what", "limit", "found", "met"), row, strict=True)) for row in found.requirements()
        ],
        "machines": [asdict(machine) for machine in machines],
        "rounds": {
            arm: [
                asdict(run) | {"steps": [asdict(step) | {"seconds": step.phases} for step in run.steps]} for run in runs
            ]
            for arm, runs in rounds.items()
        },
    }
    atomic.write_text(path, json.dumps(_finite({**about, **fields}), indent=1, allow_nan=False))


def _time_table(found: Findings) -> Table:
    table = Table(
        "",
        *(ARMS[arm] for arm in found.seconds),
        title="Seconds per step (medians; share of the step)",
        caption=f"without the first {WARM_UP_STEPS} step of each run; ratios within a round: median (least to most)",
    )
    for phase, name in PHASES.items():
        cells = [
            f"{seconds[phase]:.2f} ({seconds[phase] / seconds['total']:.0%})" for seconds in found.seconds.values()
        ]
        table.add_row(name, *cells)
    table.add_row("whole step", *(f"{seconds['total']:.2f}" for seconds in found.seconds.values()))
    table.add_row("samples per second", *(_spread(found.samples_per_second[arm]) for arm in found.seconds))
    if found.speedups:
        cells = [_spread(found.speedups[arm]) if arm in found.speedups else "1" for arm in found.seconds]
        table.add_row("ppo_ray is faster, times", *cells)
    table.add_row("peak memory, MiB", *(_spread(found.peak_mib[arm], "{:.0f}") for arm in found.seconds))
    if found.mismatch:
        cells = [f"{found.mismatch[arm]:.1g}" if arm in found.mismatch else "-" for arm in found.seconds]
        table.add_row("KL of engine and learner, nats per token", *cells)
    overhead = [f"{found.overhead[arm]:.1%}" for arm in found.seconds]
    table.add_row("overhead, of a step", *overhead)
    return table


def _machine_table(found: Findings, machines: Sequence[Machine]) -> Table:
    rates = {name: Spread.of([getattr(machine, name) / 1e9 for machine in machines]) for name in asdict(machines[0])}
    table = Table("", *(ARMS[arm] for arm in found.shares), title="Shares of what this machine can do")
    rows = {
        "update": "update, of the matrix rate",
        "learning": "forward passes and update, of the matrix rate",
        "generation": "generation, of the matrix rate",
        "generation_of_decode": "generation, of the rate at one token per sequence",
    }
    for name, label in rows.items():
        table.add_row(label, *(f"{shares[name]:.0%}" for shares in found.shares.values()))
    if found.sync_of_copy is not None:
        cells = [f"{found.sync_of_copy:.0%}" if arm == OURS else "-" for arm in found.shares]
        table.add_row("weight sync, of the copy rate", *cells)
    table.caption = (
        f"float32 products, GFLOP per second: {_spread(rates['update_flops'], '{:.0f}')} at an update's shapes, "
        f"{_spread(rates['decode_flops'], '{:.0f}')} at one token per sequence, "
        f"{_spread(rates['large_flops'], '{:.0f}')} of 2048 x 2048; "
        f"copied: {_spread(rates['copy_bytes'], '{:.1f}')} GB per second"
    )
    return table


def _agreement_table(found: Findings) -> Table:
    table = Table(
        "", "with", "mean", "its mean", "difference", "seeds' spread", "within", title="Is it the same algorithm?"
    )
    for arm, figures in found.agreements.items():
        for name, agreement in figures.items():
            numbers = [f"{value:+.4f}" for value in (*agreement.means, agreement.difference)]
            spread = "-" if math.isnan(agreement.spread) else f"{agreement.spread:.4f}"
            table.add_row(FIGURES[name], ARMS[arm], *numbers, spread, _MARK[agreement.agrees])
    table.caption = (
        "means over all steps and seeds; spread: by which single runs differ by their seeds alone, in 19 of 20 cases"
    )
    return table


def _requirement_table(found: Findings) -> Table:
    table = Table("ppo_ray", "asked for", "found", "met", title="What is asked for")
    for what, limit, value, met in found.requirements():
        table.add_row(what, limit, value, _MARK[met])
    table.caption = "overhead: from scoring that took all its seconds to scoring that went on while others generated"
    return table


def _spread(spread: Spread, form: str = "{:.2f}") -> str:
    text = form.format(spread.median)
    if spread.low == spread.high:
        return text
    return f"{text} ({form.format(spread.low)} to {form.format(spread.high)})"


def _finite(value: Any) -> Any:
    """Put null in the place of what is no number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
