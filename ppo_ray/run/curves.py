"""The picture of a run: scores, KL to the reference, and how far each update moved the policy."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_ray import atomic
from ppo_ray.run.evaluation import Evaluation
from ppo_ray.run.health import HEALTHY, Range

_BATCH, _HELD_OUT, _KL, _MOVE, _CLIP, _GREY = "#2a6f97", "#d1495b", "#3a7d44", "#8e5ea2", "#c77d0a", "#666666"
_SETS = ("#e09f3e", "#6a4c93", "#1b998b", "#8d5524")  # of evaluation.sets
_SMOOTH = 5
"""Steps that a point of a running mean is made of, as many before it as behind; fewer at the ends."""

History = Sequence[Mapping[str, float]]


def draw_curves(
    path: Path,
    history: History,
    before: Evaluation | None,
    after: Evaluation | None,
    title: str = "",
    kl_target: float | None = None,
    ranges: Mapping[str, Range] = HEALTHY,
) -> None:
    """Draw scores, KL and the size of the updates over the steps; held-out figures wherever they were measured.

    Args:
        path: the PNG to write, all of it or nothing.
        history: each step's metrics, with `step`; missing or NaN figures are gaps.
        before: held-out prompts before the first step; None: not evaluated.
        after: held-out prompts after the last step; None: not evaluated.
        title: of the picture.
        kl_target: KL that the controller aims at, nats per sequence; None: no line.
        ranges: that are healthy, by the figures' names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # a step's number is that of the steps done before it: the policy of step 0 is the one that "before" scored
    steps = [float(metrics["step"]) for metrics in history]
    passes = _find_held_out(history, before, after, "eval/pass@1")
    heights = [4, *([2.4] if passes else []), 2.4, 2.8]
    figure = Figure(figsize=(8, sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    score_axes, *others, kl_axes, move_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    score_axes.set_title(title or "PPO", loc="left", fontsize=11, fontweight="bold")
    _draw_column(score_axes, steps, history, "score/mean", _BATCH, "training batch")
    _mark_held_out(score_axes, _find_held_out(history, before, after, "eval/score_mean"), after or before)
    for name, colour in zip(_find_sets(history, before, after), itertools.cycle(_SETS)):
        points = _find_held_out(history, before, after, f"eval/{name}/score_mean")
        _mark_held_out(score_axes, points, None, colour, name)
    score_axes.set_ylabel("score")
    for axes in others:
        _mark_held_out(axes, passes, after or before)
        axes.set_ylabel("held-out pass@1")
        axes.set_ylim(-0.05, 1.15)
    _draw_column(kl_axes, steps, history, "kl/per_sequence", _KL, "")
    kl_axes.set_ylabel("KL to the reference\n(nats per sequence)")
    if kl_target is not None:
        kl_axes.axhline(kl_target, color=_KL, ls="--", lw=1, label="ppo.kl_target")
        kl_axes.legend(frameon=False, fontsize=8)
    _draw_moves(move_axes, steps, history, ranges)
    move_axes.set_xlabel("steps done")
    move_axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    for axes in (score_axes, *others, kl_axes, move_axes):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not move_axes:
            axes.axhline(0, color=_GREY, lw=0.6, zorder=0)
    atomic.write(path, lambda aside: figure.savefig(aside, format="png"))


def _draw_column(axes: Any, steps: Sequence[float], history: History, name: str, colour: str, label: str) -> None:
    """Draw each step's figure as a faint dot, and a running mean as a line."""
    values = [float(metrics.get(name, math.nan)) for metrics in history]
    half = _SMOOTH // 2
    means = []
    for index in range(len(values)):
        around = [value for value in values[max(index - half, 0) : index + half + 1] if math.isfinite(value)]
        means.append(sum(around) / len(around) if around and math.isfinite(values[index]) else math.nan)
    axes.plot(steps, values, color=colour, marker="o", ms=3, ls="none", alpha=0.35, label=label and f"{label}, mean")
    axes.plot(steps, means, color=colour, lw=1.8, label=label and f"{label}, mean of {_SMOOTH} steps")


def _find_held_out(
    history: History, before: Evaluation | None, after: Evaluation | None, name: str
) -> list[tuple[float, float, float]]:
    """Return where a held-out figure was measured: steps done, its value, and its standard error or NaN."""
    found = {float(metrics["step"]): (metrics[name], metrics) for metrics in history if name in metrics}
    for step, evaluation in ((0.0, before), (float(len(history)), after)):
        if evaluation is not None:
            value = evaluation.figures.get(name, math.nan)
            if name == "eval/score_mean" and not any(figure.count("/") > 1 for figure in evaluation.figures):
                value = evaluation.mean_score  # with sets alone it is that of the first set
            found[step] = value, evaluation.figures
    points = []
    for step, (value, figures) in sorted(found.items()):
        error = figures.get(name.replace("_mean", "_error"), math.nan) if name.endswith("score_mean") else math.nan
        if math.isfinite(value):
            points.append((step, value, error))
    return points


def _find_sets(history: History, before: Evaluation | None, after: Evaluation | None) -> list[str]:
    """Return the names of `evaluation.sets` that have a mean score, in the order in which they come."""
    seen = [*history, *(found.figures for found in (before, after) if found)]
    names = (re.fullmatch(r"eval/([\w-]+)/score_mean", name) for figures in seen for name in figures)
    return list(dict.fromkeys(found.group(1) for found in names if found))


def _mark_held_out(
    axes: Any,
    points: Sequence[tuple[float, float, float]],
    known: Evaluation | None,
    colour: str = _HELD_OUT,
    name: str = "held-out",
) -> None:
    """Draw held-out figures with their standard errors; the first and the last with their values."""
    if points:
        steps, means, errors = zip(*points, strict=True)
        label = f"{name} ({known.num_prompts} prompts)" if known else name
        line = {"color": colour, "marker": "D", "ms": 6, "ls": ":" if len(points) > 2 else "none"}
        if any(math.isfinite(error) for error in errors):
            label += ", mean ± standard error"
        axes.errorbar(steps, means, yerr=errors, capsize=3, label=label, **line)
        for step, value, _ in {points[0], points[-1]}:
            style = {"color": colour, "fontweight": "bold", "ha": "center", "xytext": (0, 11)}
            axes.annotate(f"{value:.2f}", (step, value), textcoords="offset points", **style)
    axes.margins(y=0.14)
    axes.legend(frameon=False, loc="best", fontsize=8)


def _draw_moves(axes: Any, steps: Sequence[float], history: History, ranges: Mapping[str, Range]) -> None:
    """Draw how far each update moved the policy, on a logarithmic scale, below the limits that are healthy."""
    axes.set_yscale("log")
    for name, colour in (("policy/approx_kl", _MOVE), ("policy/clip_fraction", _CLIP)):
        healthy = ranges.get(name)
        values = [float(metrics.get(name, math.nan)) for metrics in history]
        positive = [value if value > 0 else math.nan for value in values]  # zero has no place on the scale
        label = f"{name} (healthy {healthy})" if healthy else None  # with a loss of one's own there is no such figure
        axes.plot(steps, positive, color=colour, marker="o", ms=2.5, lw=1.2, label=label)
        if healthy is not None:
            axes.axhline(healthy.high, color=colour, ls="--", lw=1)
    axes.set_ylim(3e-4, 2)
    axes.set_ylabel("move per update")
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
