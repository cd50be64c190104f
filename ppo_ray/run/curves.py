"""curves.png: score and KL over the steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_ray import atomic
from ppo_ray.run.evaluation import Evaluation

_BATCH, _HELD_OUT, _KL, _GREY = "#2a6f97", "#d1495b", "#3a7d44", "#666666"


def draw_curves(
    path: Path, history: Sequence[Mapping[str, float]], before: Evaluation | None, after: Evaluation | None
) -> None:
    """Draw the batch's mean score and KL over the steps, and the held-out mean score before and after.

    Args:
        path: the PNG to write, all of it or nothing.
        history: each step's metrics, with `step`, `score/mean` and `kl/per_sequence`; missing or NaN figures are gaps.
        before: held-out prompts before the first step; None: not evaluated.
        after: held-out prompts after the last step; None: not evaluated.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # steps done when the batch was sampled: the policy of step 0 is the one that "before" scored
    steps = [float(metrics["step"]) for metrics in history]
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    score_axes, kl_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    score_axes.plot(steps, _column(history, "score/mean"), color=_BATCH, marker="o", ms=3, lw=1.5, label="batch mean")
    _mark_held_out(score_axes, len(history), before, after)
    score_axes.set_title("PPO: score and KL over the steps", loc="left", fontsize=12, fontweight="bold")
    score_axes.set_ylabel("score (reward model's output)")
    score_axes.legend(frameon=False, loc="best", fontsize=9)
    kl_axes.plot(steps, _column(history, "kl/per_sequence"), color=_KL, marker="o", ms=3, lw=1.5)
    kl_axes.set_ylabel("KL to the reference\n(nats a sequence)")
    kl_axes.set_xlabel("steps done")
    kl_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    for axes in (score_axes, kl_axes):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0, color=_GREY, lw=0.6, zorder=0)
    atomic.write(path, lambda aside: figure.savefig(aside, format="png"))


def _mark_held_out(axes: Any, num_steps: int, before: Evaluation | None, after: Evaluation | None) -> None:
    """Put a diamond and its value where the policy was evaluated: at 0 steps and after the last."""
    both = ((0, before), (num_steps, after))
    points = [(step, found) for step, found in both if found and math.isfinite(found.mean_score)]
    if not points:
        return
    axes.plot(
        [step for step, _ in points],
        [found.mean_score for _, found in points],
        color=_HELD_OUT,
        marker="D",
        ms=7,
        ls="none",
        label=f"held-out mean ({points[-1][1].num_prompts} prompts)",
    )
    for step, found in points:
        axes.annotate(
            f"{found.mean_score:+.2f}",
            (step, found.mean_score),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_HELD_OUT,
            fontweight="bold",
        )
    axes.margins(y=0.12)


def _column(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [float(metrics.get(name, math.nan)) for metrics in history]
