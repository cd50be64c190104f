"""A run on the terminal: the figures of its steps, and its best and worst responses."""

import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_ray import trajectory
from ppo_ray.errors import InputError, first_line
from ppo_ray.events import say
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.log import read_steps
from ppo_ray.run.progress import PARTS, STEP_SECONDS, format_score
from ppo_ray.run.summary import make_visible

_LAST_STEPS = 20
_LONGEST = 2000  # characters of a text in a table
_COLUMNS = ("step", "sample_id", "worker", "policy_version", "prompt", "response", "score", "finish_reason")
_STEP_COLUMNS = {
    "score": "score/mean",
    "KL": "kl/per_sequence",
    "approx. KL": "policy/approx_kl",
    "clipped": "policy/clip_fraction",
    "entropy": "policy/entropy",
    "tokens": "response/tokens_mean",
    "ended": "response/eos_rate",
    "held out": "eval/score_mean",
}


@dataclass(frozen=True)
class Figure:
    """A figure of a response that responses are ordered by."""

    compute: Callable[[pa.Table], np.ndarray]
    """Takes a table with `columns`; returns `[N]` float64, NaN where a response has none."""
    columns: tuple[str, ...]
    """That are read."""
    worst_is_highest: bool = False


def _reduce(table: pa.Table, column: str, mean: bool = False) -> np.ndarray:
    """Return each row's sum (or mean) over its tokens, `[N]` float64; NaN for a null or empty list."""
    sums = trajectory.sum_lists(table, column)
    return sums / np.maximum(trajectory.lengths(table, column), 1) if mean else sums


def _count_tokens(table: pa.Table) -> np.ndarray:
    return trajectory.lengths(table, "response_ids").astype(np.float64)


def _read_score(table: pa.Table) -> np.ndarray:
    return table.column("score").to_numpy().astype(np.float64)


def _find_mismatch(table: pa.Table) -> np.ndarray:
    """Return the largest difference of a token's log-probability between engine and learner, nats."""
    pairs = zip(trajectory.ragged(table, "rollout_logprobs"), trajectory.ragged(table, "old_logprobs"), strict=True)
    return np.array([np.abs(ours - theirs).max() if len(theirs) else np.nan for ours, theirs in pairs])


FIGURES: Mapping[str, Figure] = {
    "score": Figure(_read_score, ("score",)),
    "kl": Figure(lambda table: _reduce(table, "kl"), ("kl",), worst_is_highest=True),
    "reward": Figure(lambda table: _reduce(table, "rewards"), ("rewards",)),
    "advantage": Figure(lambda table: _reduce(table, "advantages", mean=True), ("advantages",)),
    "value": Figure(lambda table: _reduce(table, "values", mean=True), ("values",)),
    "mismatch": Figure(_find_mismatch, ("rollout_logprobs", "old_logprobs"), worst_is_highest=True),
    "tokens": Figure(_count_tokens, ("response_ids",), worst_is_highest=True),
}
"""By name: sums over a response's tokens (kl in nats, reward), means over them (advantage, value), the largest of them
(mismatch). Any other name is that of a part of the reward."""


@dataclass(frozen=True)
class Selection:
    """Which responses are shown: of equal ones the earlier, and where no number is given all, in order."""

    worst: int | None = None
    best: int | None = None
    by: str = "score"
    steps: tuple[int, ...] = ()
    """Only of these; negative ones count from the last. None given: of all."""
    contains: str | None = None
    """Only where prompt or response contains it."""


Row = dict[str, Any]
"""A response: `_COLUMNS`, and last its figure under the figure's name."""
Place = tuple[float, int, int]
"""A response's figure, step, and row of the step's file."""


def select(run: Path, selection: Selection, note: Callable[[str], None]) -> list[Row]:
    """Read the selected responses of a run: the worst, then the best, else all, by step and sample.

    One file is in memory at a time; of each the figure's columns are read first, and texts only of what is shown.

    Args:
        run: its folder.
        selection: what is wanted.
        note: is told of each file that cannot be read, which is left out.

    Raises:
        InputError: there is no run, no such step, or no response has the figure.
    """
    folder = RunFolder(run)
    steps = _find_steps(folder, selection.steps)
    figure = FIGURES.get(selection.by) or _make_part(selection.by)
    found: list[Place] = []
    for step in steps:
        try:
            found += [(value, step, row) for row, value in _measure(folder, step, figure, selection.contains)]
        except (OSError, pa.ArrowException, ValueError) as error:
            note(f"{folder.trajectory_file(step).name} is left out: {first_line(error)}")
        except KeyError as error:
            note(f"{folder.trajectory_file(step).name} is left out: it has no {error.args[0]}")
    if (selection.worst or selection.best) and not (known := [item for item in found if not math.isnan(item[0])]):
        raise InputError(
            f"{run}: none of {len(found)} responses has the figure {selection.by}; there are {', '.join(FIGURES)} and "
            "the names of the reward's parts"
        )
    if not selection.worst and not selection.best:
        return _read_rows(folder, found, selection.by, note)
    rows: list[Row] = []
    for number, sign in ((selection.worst, 1), (selection.best, -1)):
        if number:
            sign = -sign if figure.worst_is_highest else sign
            ordered = ((sign * value, step, row) for value, step, row in known)
            chosen = [(sign * value, step, row) for value, step, row in heapq.nsmallest(number, ordered)]
            rows += _read_rows(folder, chosen, selection.by, note)
    return rows


def _find_steps(folder: RunFolder, steps: Sequence[int]) -> list[int]:
    """Return the wanted steps of those that have trajectories, in order."""
    there = folder.list_steps()
    if not there:
        raise InputError(f"{folder.path}: holds no trajectories; give the folder of a run, with a step done")
    if not steps:
        return there
    wanted = []
    for step in steps:
        number = step if step >= 0 else there[step] if -step <= len(there) else None
        if number not in there:
            raise InputError(f"--step {step}: the run has the steps {there[0]} to {there[-1]}")
        wanted.append(number)
    return sorted(set(wanted))


def _make_part(name: str) -> Figure:
    """Return the figure of a part of the reward."""

    def read(table: pa.Table) -> np.ndarray:
        if "parts" not in table.column_names or table.column("parts").type.get_field_index(name) < 0:
            raise KeyError(f"part {name} of the reward")
        parts = table.column("parts").combine_chunks()
        return parts.field(name).to_numpy(zero_copy_only=False).astype(np.float64)

    return Figure(read, ("parts", "score"))


def _measure(folder: RunFolder, step: int, figure: Figure, contains: str | None) -> Iterator[tuple[int, float]]:
    """Yield the row and the figure of each response of a step that has the text."""
    texts = ["prompt", "response"] if contains is not None else []
    table = folder.read_step(step, [*figure.columns, *texts])
    values = figure.compute(table)
    rows = np.arange(len(values))
    if contains is not None:
        hits = [pc.match_substring(table.column(name), contains) for name in texts]
        rows = rows[pc.or_(*hits).to_numpy(zero_copy_only=False)]
    yield from zip(rows.tolist(), values[rows].tolist(), strict=True)


def _read_rows(folder: RunFolder, chosen: Sequence[Place], by: str, note: Callable[[str], None]) -> list[Row]:
    """Read the texts of chosen responses, each file once, and return them in the order given."""
    places: dict[int, list[int]] = {}
    for _, step, row in chosen:
        places.setdefault(step, []).append(row)
    read: dict[tuple[int, int], Row] = {}
    for step, numbers in places.items():
        try:
            lines = folder.read_step(step, _COLUMNS).take(numbers).to_pylist()
        except (OSError, pa.ArrowException) as error:
            note(f"{folder.trajectory_file(step).name} is left out: {first_line(error)}")
            continue
        read |= {(step, row): line for row, line in zip(numbers, lines, strict=True)}
    rows = []
    for value, step, row in (place for place in chosen if place[1:] in read):
        line = {name: cell for name, cell in read[step, row].items() if name != by}
        rows.append(line | {by: None if math.isnan(value) else value})
    return rows


def print_responses(rows: Sequence[Row], console: Console, as_json: bool) -> None:
    """Print responses as a table, or each as a line of JSON; whatever a model wrote stays text."""
    if as_json:
        for row in rows:
            print(json.dumps(row))  # ASCII: neither controls nor marks of direction
        return
    figure = next(reversed(rows[0])) if rows else "score"
    table = Table("step", "sample", figure, "prompt", "response", "ends by", show_lines=True)
    table.columns[2].justify = "right"
    for row in rows:
        value = row[figure]
        shown = "none" if value is None else f"{value:.4g}"
        texts = (Text(_shorten(str(row.get(name))), overflow="fold") for name in ("prompt", "response"))
        table.add_row(str(row.get("step")), str(row.get("sample_id")), shown, *texts, str(row.get("finish_reason")))
    console.print(table)
    say(console, "1 response" if len(rows) == 1 else f"{len(rows)} responses")


def _shorten(text: str) -> str:
    """Make text visible, and cut it to what a terminal has room for."""
    more = f"... ({len(text):,} characters; --json has all)" if len(text) > _LONGEST else ""
    return make_visible(text[:_LONGEST]) + more


def print_steps(run: Path, console: Console, as_json: bool) -> None:
    """Print the figures of a run's last steps, or every step as a line of JSON.

    Raises:
        InputError: it holds no step.
    """
    steps = read_steps(run)
    if not steps:
        raise InputError(f"{run}: holds no step; give the folder of a run, with a step done")
    if as_json:
        for record in steps:
            print(json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}))
        return
    columns = {name: key for name, key in _STEP_COLUMNS.items() if any(key in record for record in steps)}
    table = Table("step", *columns, "seconds", *PARTS, box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for record in steps[-_LAST_STEPS:]:
        cells = [_format(name, record.get(key)) for name, key in columns.items()]
        seconds = [record.get(key) for key in (STEP_SECONDS, *PARTS.values())]
        times = ["" if value is None else f"{value:.1f}" for value in seconds]
        table.add_row(f"{record['step']:.0f}", *cells, *times)
    console.print(table)
    say(console, f"{len(steps)} steps; responses: ppo-ray show {run} --worst 20 --by kl")


def _format(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return format_score(value) if name in ("score", "held out") else f"{value:.3g}"
