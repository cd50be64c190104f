"""Summary of a run for people: the last lines on the terminal, and samples.md."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_ray import atomic
from ppo_ray.config import Config
from ppo_ray.config.evaluation import SCORERS
from ppo_ray.events import say
from ppo_ray.run.evaluation import Evaluation
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.health import HealthCheck
from ppo_ray.run.progress import PARTS, STEP_SECONDS, format_score
from ppo_ray.weights.acks import Agreement

_SHOWN_SAMPLES = 3
# Whatever Markdown, GitHub's dialect of it (tables, strikethrough, mathematics, mentions, bare links) or HTML could
# read as structure. Character references are text in all of them, in a table's cell too.
_STRUCTURE = re.compile(r"[\\`*_{}\[\]<>&|#~$!@^=]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def print_summary(
    console: Console,
    folder: RunFolder,
    config: Config,
    history: Sequence[Mapping[str, float]],
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    """Print what a run changed, whether its figures were healthy, what its steps took, and what to do next."""
    _print_samples(console, before, after)
    _print_change(console, history, before, after)
    if history:
        health = HealthCheck(config.ppo.policy_loss, config.ppo.value_warmup_steps)
        say(console, f"{health.describe(history)} (docs/diagnostics.md)")
    _print_seconds(console, history)
    outputs = {
        "samples before and after": folder.samples,
        "scores, KL and updates over steps": folder.curves,
        "report, one page for mail": folder.report,
        "trained policy": folder.final_checkpoint,
        "evaluations": folder.after,
        "metrics": folder.metrics,
        "trajectories": folder.trajectories,
        "resolved config": folder.config,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, path in outputs.items():
        if path.exists():
            table.add_row(name, Text(_show_path(path), overflow="fold"))
    console.print(table)
    if history:
        say(console, "next:")
        for line in _next_commands(folder, config):
            say(console, f"  {line}")


def _next_commands(folder: RunFolder, config: Config) -> Iterator[str]:
    names = {key.removeprefix("reward.") for key in SCORERS}  # which `evaluate` does not take from a checkpoint
    scorers = config.reward.model_dump(mode="json", include=names, exclude_defaults=True)
    options = (
        f"reward.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in scorers.items()
    )
    yield shlex.join(["ppo-ray", "evaluate", _show_path(folder.final_checkpoint), *options])
    yield f"ppo-ray view {shlex.quote(_show_path(folder.path))}"
    yield f"tensorboard --logdir {shlex.quote(_show_path(folder.tensorboard))}"
    if config.ppo.learning_rate_schedule == "constant":  # another ends with the steps that it was planned for
        yield f"ppo-ray train {shlex.quote(_show_path(folder.config))} --resume steps={2 * config.steps}"


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
    """Print what a check of the engines found: differences of log-probabilities, nats per token."""
    table = Table("worker", "to the weights sent", "to those before", "between the two")
    for item in agreements:
        table.add_row(item.worker, f"{item.to_moved:.1e}", f"{item.to_own:.1e}", f"{item.move:.1e}")
    console.print(table)
    say(
        console,
        "every engine computes with the weights it was sent; differences of log-probabilities, nats per token",
    )


def _print_samples(console: Console, before: Evaluation | None, after: Evaluation | None) -> None:
    """Print a few held-out prompts and the responses before and after, cut to the console's width."""
    pairs = list(zip(before.samples, after.samples, strict=False))[:_SHOWN_SAMPLES] if before and after else []
    if not pairs:
        return
    width = max((console.width - 26) // 3, 12)  # but for borders and scores
    table = Table("prompt ends", "before", "score", "after", "score")
    for column in table.columns:
        column.no_wrap = True
    for old, new in pairs:
        cells = [make_visible(old.prompt)[-width:]]
        for sample in (old, new):
            cells += [make_visible(sample.response)[:width], format_score(sample.score)]
        table.add_row(*map(Text, cells))
    console.print(table)


def make_visible(text: str) -> str:
    """Make one visible line of text: a terminal stays as it is, whatever a model writes."""
    return "".join(map(_show_character, text))


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
            f"over {len(history)} steps; KL to the reference {kl:.2f} nats per sequence at the last",
        )


def _print_seconds(console: Console, history: Sequence[Mapping[str, float]]) -> None:
    """Print mean, shortest and longest seconds per step and of its parts, and each part's share."""
    whole = _seconds(history, STEP_SECONDS)
    if not whole:
        return
    table = Table("seconds per step", "mean", "min", "max", "share", title_justify="left")
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
