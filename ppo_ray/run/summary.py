"""What the terminal says at the end: what changed, what a step took, where things are."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_ray.learner.reports import Agreement
from ppo_ray.run.evaluation import Evaluation
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.progress import PARTS, STEP_SECONDS, signed


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
            table.add_row(name, Text(_shown(path), overflow="fold"))
    console.print(table)


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the figures of one evaluation and its samples."""
    if evaluation.samples:
        table = Table("prompt", "response", "score", show_lines=True)
        table.columns[2].justify = "right"
        for sample in evaluation.samples:
            table.add_row(_plain(sample.prompt), _plain(sample.response), signed(sample.score))
        console.print(table)
    _say(console, f"held-out mean score {_mean(evaluation)}{_unscored(evaluation)}")


def print_agreements(console: Console, agreements: Sequence[Agreement]) -> None:
    """Print what a check of the engines found: differences of log-probabilities, nats a token."""
    table = Table("worker", "to the weights sent", "to those before", "between the two")
    for item in agreements:
        table.add_row(item.worker, f"{item.to_moved:.1e}", f"{item.to_own:.1e}", f"{item.move:.1e}")
    console.print(table)
    _say(
        console,
        "every engine computes with the weights it was sent; differences of log-probabilities, nats a token",
    )


def _print_change(
    console: Console, history: Sequence[Mapping[str, float]], before: Evaluation | None, after: Evaluation | None
) -> None:
    if before and after:
        rise = signed(after.mean_score - before.mean_score)
        _say(
            console,
            f"held-out mean score {signed(before.mean_score)} -> {signed(after.mean_score)} ({rise}; "
            f"{after.num_prompts} prompts, standard deviation {before.std_score:.2f} -> {after.std_score:.2f})"
            f"{_unscored(after)}",
        )
    if history:
        first, last = history[0], history[-1]
        kl = last.get("kl/per_sequence", math.nan)
        _say(
            console,
            f"batch mean score {signed(first.get('score/mean'))} -> {signed(last.get('score/mean'))} "
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
            figures = (sum(seconds) / len(seconds), min(seconds), max(seconds))
            share = sum(seconds) / sum(whole) if sum(whole) else math.nan
            table.add_row(name, *(f"{figure:.2f}" for figure in figures), f"{share:.0%}")
    console.print(table)


def _seconds(history: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [metrics[key] for metrics in history if key in metrics]


def _mean(evaluation: Evaluation) -> str:
    spread = f"standard deviation {evaluation.std_score:.2f}"
    return f"{signed(evaluation.mean_score)} ({spread}, {evaluation.num_prompts} prompts)"


def _unscored(evaluation: Evaluation) -> str:
    return f"; {evaluation.num_unscored} of the responses could not be scored" if evaluation.num_unscored else ""


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plain(text: str) -> Text:
    """Keep a terminal safe from what a model writes: no markup, no control characters but the end of a line."""
    return Text("".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text))


def _shown(path: Path) -> str:
    """Show a path below the current folder as relative to it, any other whole."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
