"""The picture: where a step's seconds go, how many samples per second, and the steps' figures beside one another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.arms import ARMS, FIGURES, OURS, OURS_BFLOAT16, PHASES
from benchmarks.compare.findings import LEAST_SPEEDUP, Findings
from benchmarks.compare.summary import Rounds

_ARM_COLOURS = {"trl": "#8a8a8a", "trl-batched": "#33658a", "ppo-ray": "#cc3311", "ppo-ray-bf16": "#ee8866"}
_PHASE_COLOURS: Mapping[str, str] = dict(
    zip(PHASES, ("#1b9e77", "#a6d854", "#7570b3", "#e6ab02", "#e7298a", "#d9c8a9"), strict=True)
)
"""No colour stands for an arm and for a phase."""


def draw(found: Findings, rounds: Rounds, path: Path) -> None:
    """Draw all of it into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 6.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 4))
    seconds, samples = upper.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    _draw_seconds(seconds, found)
    _draw_samples(samples, found, rounds)
    for axes, name in zip(lower.subplots(1, len(FIGURES)), FIGURES, strict=True):
        _draw_figure(axes, name, rounds)
    lower.suptitle("each step's figures: thick the mean of the seeds, thin each seed", fontsize=10)
    figure.savefig(path, format="png")


def _draw_seconds(axes: Any, found: Findings) -> None:
    """Stack the phases' medians, one bar per arm, the first one on top, with the median of whole steps.

    A phase that is below 1% of every arm's step is too small to be seen, and left out of the legend.
    """
    names = [ARMS[arm] for arm in found.seconds]
    left = np.zeros(len(names))
    totals = np.array([sum(max(value, 0.0) for value in seconds.values()) for seconds in found.seconds.values()])
    for phase, label in PHASES.items():
        widths = np.array([max(seconds[phase], 0.0) for seconds in found.seconds.values()])
        if (widths < 0.01 * totals).all():
            label = "_"  # matplotlib's mark of what has no place in a legend
        axes.barh(names, widths, left=left, color=_PHASE_COLOURS[phase], label=label)
        left += widths
    for name, stop, seconds in zip(names, left, found.seconds.values(), strict=True):
        label = f"{seconds['total']:.1f} s"
        axes.annotate(label, (stop, name), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_title("seconds per step, medians", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_samples(axes: Any, found: Findings, rounds: Rounds) -> None:
    """Draw samples per second: a bar from zero to the median, and a line from the lowest round to the highest."""
    times = [f"{found.speedups[other].median:.1f}" for other in LEAST_SPEEDUP if other in found.speedups]
    for arm in rounds:
        spread, name = found.samples_per_second[arm], ARMS[arm]
        axes.barh(name, spread.median, color=_ARM_COLOURS[arm], height=0.6)
        axes.plot([spread.low, spread.high], [name, name], color="black", lw=1.5)
        label = f"{spread.median:.2f}"
        if arm == OURS and times:
            label += f": {' and '.join(times)} times TRL"
        if arm == OURS_BFLOAT16 and found.bfloat16_speedup is not None:
            label += f": {found.bfloat16_speedup.median:.1f} times float32"
        axes.annotate(label, (spread.high, name), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.7 * max(spread.high for spread in found.samples_per_second.values()))
    axes.tick_params(labelleft=False)
    axes.set_xlabel("samples per second", fontsize=9)
    axes.set_title("samples per second, medians and rounds", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_figure(axes: Any, name: str, rounds: Rounds) -> None:
    for arm, runs in rounds.items():
        values = np.array([[step.figures[name] for step in run.steps] for run in runs])
        steps = np.arange(values.shape[1])
        axes.plot(steps, values.T, color=_ARM_COLOURS[arm], lw=0.6, alpha=0.6)
        axes.plot(steps, values.mean(0), color=_ARM_COLOURS[arm], marker="o", ms=3, lw=2, label=ARMS[arm])
    axes.set_title(FIGURES[name], fontsize=9)
    axes.set_xlabel("steps done", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if name == "score":
        axes.legend(frameon=False, fontsize=7)
