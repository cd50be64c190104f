"""The trajectories of a run as one table of figures and texts, to be filtered, sorted and searched.

Each step's Parquet file is read once, when it is new or has changed. Of its lists per token only sums and means are
kept, so that 100,000 trajectories take some tens of megabytes. Files that cannot be read are left out and named.
"""

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ppo_ray import trajectory
from ppo_ray.errors import InputError, first_line
from ppo_ray.run.folder import RunFolder
from ppo_ray.trajectory import lengths

_PLAIN = ("sample_id", "policy_version", "worker", "finish_reason", "score", "truncated", "prompt", "response")
_MESSAGES = "messages"
_SUMS = {"kl": "kl"}
"""Columns whose sum over the response's tokens is kept, by the name that it gets."""
_MEANS = {"logprob": "rollout_logprobs", "advantage": "advantages", "value": "values"}
"""Columns whose mean over the response's tokens is kept."""
_COLUMNS = (*_PLAIN, "response_ids", *_SUMS.values(), *_MEANS.values(), _MESSAGES, "parts")
NUMBERS = ("step", "sample_id", "policy_version", "score", "tokens", *_SUMS, *_MEANS)
"""Columns that can be limited to a range; beside them the reward's parts, as `parts.NAME`."""
CHOICES = ("finish_reason", "worker")
"""Columns that can be limited to one of their values."""
TEXTS = ("response", "prompt")
"""Columns that can be searched."""

Stamp = tuple[int, int]
"""When a file was written, and its size: what changes when the file does."""


@dataclass(frozen=True)
class Query:
    """What is asked for: which trajectories, in which order, and which of those."""

    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Smallest and largest value of a column of numbers, both included; a row without a value is left out."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """The value of a column of choices."""
    text: str = ""
    """Is looked for, without regard to case."""
    text_column: str = "response"
    is_pattern: bool = False
    """Whether `text` is a regular expression, by RE2's syntax."""
    sort: str = "step"
    """A column; rows without a value come last."""
    is_descending: bool = False
    offset: int = 0
    limit: int = 50


@dataclass(frozen=True)
class Page:
    """An answer to a query."""

    num_matches: int
    rows: list[dict[str, Any]]


class TrajectoryIndex:
    """An index of one run's trajectories; safe to use from several threads."""

    def __init__(self, folder: RunFolder) -> None:
        """Index nothing yet; see `refresh`."""
        self._folder = folder
        self._files: dict[int, tuple[Stamp, pa.Table | None]] = {}
        self._lock = threading.Lock()
        self._table: pa.Table | None = None
        self._described: tuple[pa.Table, dict[str, Any]] | None = None
        self._num_files = 0
        self.skipped: dict[str, str] = {}
        """Names of files that cannot be read, with the reason."""

    def refresh(self, budget_s: float) -> bool:
        """Read files that are new or have changed for about so many seconds; True if none is left."""
        deadline = time.monotonic() + budget_s
        with self._lock:
            found = self._list_files()
            self._num_files = len(found)
            gone = [step for step in self._files if step not in found]
            for step in gone:
                del self._files[step]
            stale = [step for step, stamp in found.items() if self._files.get(step, (None,))[0] != stamp]
            done = 0
            for step in sorted(stale):
                self._files[step] = found[step], self._read(step)
                done += 1
                if time.monotonic() > deadline:
                    break
            if done or gone:
                self._table = None
            return done == len(stale)

    @property
    def progress(self) -> tuple[int, int]:
        """Files that were read, and files that there are."""
        return len(self._files), self._num_files

    @property
    def table(self) -> pa.Table:
        """All rows that were read, by step and by row of its file (`step`, `row`)."""
        with self._lock:
            if self._table is None:
                tables = [table for _, (_, table) in sorted(self._files.items()) if table is not None]
                self._table = pa.concat_tables(tables, promote_options="default") if tables else _EMPTY
            return self._table

    def search(self, query: Query) -> Page:
        """Return the rows that a query asks for, with the beginning of their texts.

        Raises:
            InputError: a column is unknown, or the pattern is no regular expression.
        """
        table = self.table
        chosen = self._select(table, query)
        if query.sort not in table.column_names:
            raise InputError(f"sort={query.sort}: no such column")
        keys = pc.take(table.column(query.sort), chosen)
        known = pc.is_valid(keys)  # figures that are not finite are null
        with_keys = pa.table({"key": keys.filter(known), "place": chosen.filter(known)})
        order = "descending" if query.is_descending else "ascending"
        ranks = pc.sort_indices(with_keys, sort_keys=[("key", order), ("place", "ascending")])
        last = chosen.filter(pc.invert(known)).to_numpy()
        places = np.concatenate([with_keys.column("place").to_numpy()[ranks.to_numpy()], last])
        shown = places[query.offset : query.offset + query.limit].tolist()
        return Page(len(chosen), [_excerpt(table.slice(place, 1).to_pylist()[0]) for place in shown])

    def find_prompt(self, prompt: str, limit: int) -> Page:
        """Return the trajectories with exactly this prompt, by step."""
        table = self.table
        places = np.flatnonzero(pc.equal(table.column("prompt"), prompt).to_numpy(zero_copy_only=False))
        return Page(len(places), [_excerpt(table.slice(int(place), 1).to_pylist()[0]) for place in places[:limit]])

    def describe(self) -> dict[str, Any]:
        """Return the columns that can be asked for, and the values of those with choices."""
        table = self.table
        if self._described is None or self._described[0] is not table:
            numbers = [name for name in table.column_names if name in NUMBERS or name.startswith("parts.")]
            limits = {name: pc.min_max(table.column(name)).as_py() for name in numbers}
            choices = {name: sorted(map(str, pc.unique(table.column(name)).to_pylist())) for name in CHOICES}
            self._described = table, {"numbers": limits, "choices": choices, "num_rows": table.num_rows}
        return self._described[1]

    def _select(self, table: pa.Table, query: Query) -> pa.Array:
        """Return the places of the rows that a query is about."""
        masks = []
        for name, (low, high) in query.ranges.items():
            if name not in table.column_names or name in (*CHOICES, *TEXTS):
                raise InputError(f"{name}: no such column of numbers")
            column = table.column(name)
            masks += [pc.greater_equal(column, low)] if low is not None else []
            masks += [pc.less_equal(column, high)] if high is not None else []
        for name, value in query.choices.items():
            if name not in CHOICES:
                raise InputError(f"{name}: no such column of choices")
            masks.append(pc.equal(table.column(name), value))
        if query.text:
            if query.text_column not in TEXTS:
                raise InputError(f"{query.text_column}: no column of text")
            match = pc.match_substring_regex if query.is_pattern else pc.match_substring
            try:
                masks.append(match(table.column(query.text_column), query.text, ignore_case=True))
            except pa.ArrowInvalid as error:
                raise InputError(f"{query.text}: no regular expression: {first_line(error)}") from error
        chosen = np.ones(table.num_rows, bool)
        for mask in masks:
            chosen &= pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
        return pa.array(np.flatnonzero(chosen))

    def _list_files(self) -> dict[int, Stamp]:
        """Return of each step that has a file what changes when the file does."""
        found = {}
        for step in self._folder.list_steps():
            with contextlib.suppress(OSError):  # it has just gone
                stat = self._folder.trajectory_file(step).stat()
                found[step] = stat.st_mtime_ns, stat.st_size
        return found

    def _read(self, step: int) -> pa.Table | None:
        name = self._folder.trajectory_file(step).name
        self.skipped.pop(name, None)
        try:
            return summarize(self._folder.read_step(step, _COLUMNS), step)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            self.skipped[name] = first_line(error)
            return None


def summarize(table: pa.Table, step: int) -> pa.Table:
    """Make a step's rows of the index: its texts, and its lists as sums and means over the response's tokens."""
    tokens = lengths(table, "response_ids")
    columns: dict[str, Any] = {
        "step": pa.array(np.full(table.num_rows, step, np.int64)),
        "row": pa.array(np.arange(table.num_rows)),
        **{name: table.column(name) for name in _PLAIN},
        "tokens": pa.array(tokens),
        **{name: _total(table, column, None) for name, column in _SUMS.items()},
        **{name: _total(table, column, tokens) for name, column in _MEANS.items()},
    }
    if _MESSAGES in table.column_names:
        columns[_MESSAGES] = table.column(_MESSAGES)
    if "parts" in table.column_names:
        parts = table.column("parts").combine_chunks()
        for part in parts.type:
            columns[f"parts.{part.name}"] = pc.struct_field(parts, part.name)
    columns["score"] = _drop_nonfinite(columns["score"])
    return pa.table(columns)


def read_messages(text: str | None) -> list[dict[str, str]] | None:
    """Return a conversation's roles and contents; None where it is none."""
    try:
        messages = json.loads(text) if text else None
        return messages and [{"role": str(item["role"]), "content": str(item["content"])} for item in messages]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _total(table: pa.Table, column: str, counts: np.ndarray | None) -> pa.Array:
    """Return each list's sum, or its mean over so many items; null where there is none, or it is not finite."""
    there = column in table.column_names
    sums = trajectory.sum_lists(table, column) if there else np.full(table.num_rows, np.nan)
    if counts is not None:
        sums /= np.maximum(counts, 1)
    return pa.array(sums, mask=~np.isfinite(sums))


def _drop_nonfinite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.is_finite(column), column, None)


_EXCERPT = 400
"""Characters of a text that a row of a page has."""


def _excerpt(row: dict[str, Any]) -> dict[str, Any]:
    for name in TEXTS:
        row[f"{name}_chars"] = len(row[name])
    row["response"] = row["response"][:_EXCERPT]
    row["prompt"] = row["prompt"][-_EXCERPT:]  # its end says what is asked
    messages = read_messages(row.pop(_MESSAGES, None)) or []
    row["question"] = next((item["content"][-_EXCERPT:] for item in reversed(messages) if item["role"] == "user"), None)
    return row


_EMPTY = pa.table(
    {
        **dict.fromkeys(("step", "row", "sample_id", "policy_version", "tokens"), pa.array([], pa.int64())),
        **dict.fromkeys((*CHOICES, *TEXTS), pa.array([], pa.string())),
        **dict.fromkeys(("score", *_SUMS, *_MEANS), pa.array([], pa.float64())),
    }
)
