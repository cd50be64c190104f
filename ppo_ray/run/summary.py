"""Summary of a run for people: the last lines on the terminal, samples.md and curves.png."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_ray import atomic
from ppo_ray.events import say
from ppo_ray.run.evaluation import Evaluation
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.progress import PARTS, STEP_SECONDS, format_score
from ppo_ray.weights.acks import Agreement

# Whatever Markdown, GitHub's dialect of it (tables, strikethrough, mathematics, mentions, bare links) or HTML could
# read as structure. Character references are text in all of them, in a table's cell too.
_STRUCTURE = re.compile(r"[\\`*_{}\[\]<>&|#~$!@^=]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_HELD_OUT_MEAN = re.compile(r"eval/([\w-]+/)?score_mean")
_OTHERS = ("#e09f3e", "#6a4c93", "#1b998b", "#8d5524")  # of evaluation.sets
_BATCH, _HELD_OUT, _KL, _GREY = "#2a6f97", "#d1495b", "#3a7d44", "#666666"


def print_summary(
    console: Console,
    folder: RunFolder,
    history: Sequence[Mapping[str, float]],
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    """Print what a run changed, what its steps took and where its outputs are, those that are there."""
    _print_change(console, history, before, after)
    _print_seconds(console, history)
    outputs = {
        "samples before and after": folder.samples,
        "score and KL over steps": folder.curves,
        "trained policy": folder.final_checkpoint,
        "metrics": folder.metrics,
        "TensorBoard": folder.tensorboard,
        "trajectories": folder.trajectories,
        "resolved config": folder.config,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, path in outputs.items():
        if path.exists():
            table.add_row(name, Text(_show_path(path), overflow="fold"))
    console.print(table)


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the metrics of one evaluation and its samples."""
    if evaluation.samples:
        table = Table("prompt", "response", "score", show_lines=True)
        table.columns[2].justify = "right"
        for sample in evaluation.samples:
            table.add_row(_plain(sample.prompt), _plain(sample.response), format_score(sample.score))
        console.print(table)
    rates = {
        name: rate for name, rate in evaluation.figures.items() if name not in ("eval/score_mean", "eval/unscored")
    }
    if rates:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, rate in rates.items():
            table.add_row(name.removeprefix("eval/"), f"{rate:.3f}")
        console.print(table)
    say(console, f"held-out mean score {_describe_mean(evaluation)}{_describe_failures(evaluation)}")


def print_agreements(console: Console, agreements: Sequence[Agreement]) -> None:
    """Print what a check of the engines found: differences of log-probabilities, nats a token."""
    table = Table("worker", "to the weights sent", "to those before", "between the two")
    for item in agreements:
        table.add_row(item.worker, f"{item.to_moved:.1e}", f"{item.to_own:.1e}", f"{item.move:.1e}")
    console.print(table)
    say(
        console,
        "every engine computes with the weights it was sent; differences of log-probabilities, nats a token",
    )


def _print_change(
    console: Console, history: Sequence[Mapping[str, float]], before: Evaluation | None, after: Evaluation | None
) -> None:
    if before and after:
        rise = format_score(after.mean_score - before.mean_score)
        say(
            console,
            f"held-out mean score {format_score(before.mean_score)} -> {format_score(after.mean_score)} ({rise}; "
            f"{after.num_prompts} prompts, standard deviation {before.std_score:.2f} -> {after.std_score:.2f})"
            f"{_describe_failures(after)}",
        )
        for name in (name for name in after.sets if name in before.sets):
            old, new = before.sets[name].mean_score, after.sets[name].mean_score
            say(console, f"  of {name}: {format_score(old)} -> {format_score(new)}")
    if history:
        first, last = history[0], history[-1]
        kl = last.get("kl/per_sequence", math.nan)
        say(
            console,
            f"batch mean score {format_score(first.get('score/mean'))} -> {format_score(last.get('score/mean'))} "
            f"over {len(history)} steps; KL to the reference {kl:.2f} nats a sequence at the last",
        )


def _print_seconds(console: Console, history: Sequence[Mapping[str, float]]) -> None:
    """Print mean, shortest and longest seconds of a step and of its parts, and each part's share."""
    whole = _seconds(history, STEP_SECONDS)
    if not whole:
        return
    table = Table("seconds a step", "mean", "min", "max", "share", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, key in {**PARTS, "whole step": STEP_SECONDS}.items():
        seconds = _seconds(history, key)
        if seconds:
            if name == "whole step":
                table.add_section()
            spread = (sum(seconds) / len(seconds), min(seconds), max(seconds))
            share = sum(seconds) / sum(whole) if sum(whole) else math.nan
            table.add_row(name, *(f"{value:.2f}" for value in spread), f"{share:.0%}")
    console.print(table)


def _seconds(history: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [metrics[key] for metrics in history if key in metrics]


def _describe_mean(evaluation: Evaluation) -> str:
    spread = f"standard deviation {evaluation.std_score:.2f}"
    return f"{format_score(evaluation.mean_score)} ({spread}, {evaluation.num_prompts} prompts)"


def _describe_failures(evaluation: Evaluation) -> str:
    return f"; {evaluation.num_unscored} of the responses could not be scored" if evaluation.num_unscored else ""


def _plain(text: str) -> Text:
    """Keep a terminal safe from what a model writes: no markup, no control characters but the end of a line."""
    return Text("".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text))


def _show_path(path: Path) -> str:
    """Show a path below the current folder as relative to it, any other whole."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def write_samples(path: Path, before: Evaluation, after: Evaluation) -> None:
    """Write the table of samples before and after; generated text can neither break nor format it.

    Where a run that went on shows another number of them (`evaluation.num_samples`), the table has the fewer. Where it
    held out other prompts, a row shows both.
    """
    atomic.write_text(path, "\n".join(_sample_lines(before, after)) + "\n")


def _sample_lines(before: Evaluation, after: Evaluation) -> Iterator[str]:
    yield "# Samples"
    yield ""
    change = f"{format_score(before.mean_score)} to {format_score(after.mean_score)}"
    yield (
        "One response to each held-out prompt, before and after training. "
        f"Over all {after.num_prompts} of them the mean score went from {change}."
    )
    yield ""
    yield "| | Prompt | Response before | Score before | Response after | Score after |"
    yield "|--:|---|---|--:|---|--:|"
    for number, (old, new) in enumerate(zip(before.samples, after.samples, strict=False), 1):
        # a run that went on after the data set was changed may hold out other prompts
        prompt = old.prompt if old.prompt == new.prompt else f"before: {old.prompt}\nafter: {new.prompt}"
        was, now = (f"{escape(sample.response)} | {format_score(sample.score)}" for sample in (old, new))
        yield f"| {number} | {escape(prompt)} | {was} | {now} |"


def escape(text: str) -> str:
    """Make text of one line of a Markdown table's cell that shows as it is; invisible characters become their codes."""
    visible = "".join(_show_character(character) for character in text)
    return _STRUCTURE.sub(lambda match: f"&#{ord(match[0])};", visible)


def _show_character(character: str) -> str:
    if character == "\n":
        return "↵"
    if character.isprintable():
        return character
    # controls, text direction, unpaired surrogates, unusual spaces and ends of lines
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def draw_curves(
    path: Path, history: Sequence[Mapping[str, float]], before: Evaluation | None, after: Evaluation | None
) -> None:
    """Draw the batch's mean score and KL over the steps, and the held-out mean score wherever it was measured.

    Args:
        path: the PNG to write, all of it or nothing.
        history: each step's metrics, with `step`, `score/mean` and `kl/per_sequence`; missing or NaN ones are gaps.
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
    _mark_held_out(score_axes, history, before, after)
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


def _mark_held_out(
    axes: Any, history: Sequence[Mapping[str, float]], before: Evaluation | None, after: Evaluation | None
) -> None:
    """Draw the held-out mean score where the policy was evaluated, a line per set; the first and last with values."""
    measured = [*((int(metrics["step"]), metrics) for metrics in history)]
    measured += [(step, found.figures) for step, found in ((0, before), (len(history), after)) if found]
    keys = dict.fromkeys(key for _, figures in measured for key in figures if _HELD_OUT_MEAN.fullmatch(key))
    own = "eval/score_mean"
    scores: dict[str, dict[int, float]] = {own: {}, **{key: {} for key in keys}}
    for step, figures in measured:
        for key in keys:
            if key in figures:
                scores[key][step] = figures[key]
    if not any(found and found.figures and own not in found.figures for found in (before, after)):
        scores[own] |= {step: found.mean_score for step, found in ((0, before), (len(history), after)) if found}
    colours = itertools.cycle(_OTHERS)
    for key, of_steps in scores.items():
        points = [(step, score) for step, score in sorted(of_steps.items()) if math.isfinite(score)]
        if not points:
            continue
        colour = _HELD_OUT if key == own else next(colours)
        known = after or before
        label = f"held-out mean ({known.num_prompts} prompts)" if known else "held-out mean"
        label = label if key == own else f"{key.split('/')[1]}: mean"
        steps, means = zip(*points, strict=True)
        axes.plot(steps, means, color=colour, marker="D", ms=7, ls=":" if len(points) > 2 else "none", label=label)
        for step, score in {points[0], points[-1]}:
            axes.annotate(
                f"{score:+.2f}",
                (step, score),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontweight="bold",
            )
        axes.margins(y=0.12)


def _column(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [float(metrics.get(name, math.nan)) for metrics in history]
