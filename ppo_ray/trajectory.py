"""The record that actors exchange: one Arrow row a trajectory, by way of Ray's object store.

A trajectory is one prompt, the response sampled for it, what the rollout worker knew of it and, later, its score. Token
ids are what the learner trains on; the texts are for the reward model and for people. Masks come from list lengths,
never from token ids, because the pad token may equal the end-of-sequence token.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = "2"

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),  # see PromptBatch.sample_ids
        pa.field("step", pa.int64(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),  # of the weights that sampled it
        pa.field("worker", pa.string(), nullable=False),  # who sampled it, e.g. "rollout-0"
        pa.field("seed", pa.int64(), nullable=False),  # of its sampling
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # [P]
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),  # [R], the end-of-sequence token included
        pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),  # [R]
        pa.field("finish_reason", pa.string(), nullable=False),  # "stop" (end of sequence) or "length"
        pa.field("score", pa.float32(), nullable=True),  # null: not scored, or could not be
        pa.field("truncated", pa.bool_(), nullable=True),  # whether the classifier saw the end of the text only
    ],
    metadata={"ppo_ray.schema": SCHEMA_VERSION},
)
"""The exchange between rollout workers, reward workers and the learner."""

EXTRAS = {
    "messages": "the conversation that the prompt was made of, JSON of a list of messages with role and content; text",
    "row": "the columns of `prompts.keep`, a struct typed as in the data set",
    "parts": "each part's score before its weight, where the reward has several; a struct of float32",
    "group_id": "index of the prompt in the prompt stream, where each prompt has several responses; int64",
}
"""Columns that a table may have behind those of `SCHEMA`; all trajectories of a step have the same."""

GROUP_ID = pa.int64()
"""Type of the column `group_id`."""

LEARNED_FIELDS = ("old_logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns")
"""What the learner adds: lists of `[R]` float32, null for a trajectory that was left out of the update."""

LEARNED_SCHEMA = pa.schema(
    [*SCHEMA, *(pa.field(name, pa.list_(pa.float32()), nullable=True) for name in LEARNED_FIELDS)],
    metadata=SCHEMA.metadata,
)
"""What a run writes to `trajectories/`."""


_ADDED_SINCE = {"1": ("truncated", "kl"), SCHEMA_VERSION: ()}
"""The versions that can be read, each with the columns that it may lack."""


def from_rows(rows: Sequence[Mapping[str, Any]], extras: pa.Table | None = None) -> pa.Table:
    """Build a validated table of `SCHEMA` from one mapping a trajectory; a missing score is null.

    Args:
        rows: by the names of `SCHEMA`.
        extras: columns of `EXTRAS`, a row per trajectory; None: there are none.
    """
    columns = {field.name: [row.get(field.name) for row in rows] for field in SCHEMA}
    table = pa.Table.from_pydict(columns, schema=SCHEMA)
    if extras is not None:
        for name in extras.column_names:
            table = table.append_column(name, extras.column(name))
    validate(table)
    return table


def validate(table: pa.Table) -> None:
    """Check that a table is what the exchange promises.

    Raises:
        ValueError: a schema of another version, a null where none may be, an empty prompt or response, or a trajectory
            whose log-probabilities do not number its response tokens. The message names the sample.
    """
    extras = table.schema.names[len(SCHEMA) :]
    if (
        not pa.schema(list(table.schema)[: len(SCHEMA)]).equals(SCHEMA)
        or not set(extras) <= set(EXTRAS)
        or len(set(extras)) < len(extras)
        or (table.schema.metadata or {}).get(b"ppo_ray.schema") != SCHEMA_VERSION.encode()
    ):
        raise ValueError(f"not a trajectory table of schema version {SCHEMA_VERSION}: {table.schema}")
    if "group_id" in extras:
        groups = table.column("group_id")
        if groups.type != GROUP_ID or groups.null_count:
            raise ValueError(f"trajectory column 'group_id' is {groups.type} with {groups.null_count} nulls")
    for field in SCHEMA:
        if not field.nullable and table.column(field.name).null_count:
            raise ValueError(
                f"trajectory column {field.name!r} has {table.column(field.name).null_count} nulls; it may have none"
            )
    sample_ids = table.column("sample_id").to_numpy()
    num_prompt, num_response = lengths(table, "prompt_ids"), lengths(table, "response_ids")
    num_logprobs = lengths(table, "rollout_logprobs")
    for name, wrong in (("prompt", num_prompt == 0), ("response", num_response == 0)):
        if wrong.any():
            raise ValueError(f"trajectory of sample {sample_ids[wrong][0]}: the {name} has no token")
    wrong = num_response != num_logprobs
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"trajectory of sample {sample_ids[row]}: {num_response[row]} response tokens "
            f"but {num_logprobs[row]} log-probabilities"
        )


def find_flat(table: pa.Table) -> np.ndarray:
    """Say of each row whether the scores of its group are all equal, so that the group teaches nothing: `[N]` bool.

    Responses without a score do not count. A group without any is not flat, and no row is where there are no groups.

    Args:
        table: of `SCHEMA`, scored.
    """
    if "group_id" not in table.column_names or not table.num_rows:
        return np.zeros(table.num_rows, bool)
    scores = table.column("score").to_numpy().astype(np.float32)  # null becomes NaN
    _, group = np.unique(table.column("group_id").to_numpy(), return_inverse=True)
    lowest, highest = (np.full(group.max() + 1, end, np.float32) for end in (np.inf, -np.inf))
    scored = np.isfinite(scores)
    np.minimum.at(lowest, group[scored], scores[scored])
    np.maximum.at(highest, group[scored], scores[scored])
    return (lowest == highest)[group]


def lengths(table: pa.Table, column: str) -> np.ndarray:
    """Return how many items each row's list has: `[N]` int64, 0 for a null list."""
    chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column(column).chunks]
    return np.concatenate(chunks).astype(np.int64) if chunks else np.zeros(0, np.int64)


def sum_lists(table: pa.Table, column: str) -> np.ndarray:
    """Return the sum of each row's list of numbers: `[N]` float64, NaN for a null or empty list."""
    sizes = lengths(table, column)
    sums, filled = np.full(len(sizes), np.nan), np.flatnonzero(sizes)
    if len(filled):
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in table.column(column).chunks])
        starts = np.cumsum(sizes) - sizes
        sums[filled] = np.add.reduceat(values.astype(np.float64), starts[filled])
    return sums


def ragged(table: pa.Table, column: str) -> list[np.ndarray]:
    """Return each row's list as a read-only numpy view: no copy of what lies in the object store."""
    rows: list[np.ndarray] = []
    for chunk in table.column(column).chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        rows.extend(values[start:stop] for start, stop in pairwise(offsets))
    return rows


def with_scores(table: pa.Table, scores: Sequence[float | None], truncated: Sequence[bool] | None = None) -> pa.Table:
    """Return the table with its scores; None and non-finite scores become null.

    Args:
        table: of `SCHEMA`.
        scores: one per trajectory.
        truncated: whether the beginning of each text was left out when it was scored; None: nobody knows.

    Raises:
        ValueError: there is not one score a trajectory.
    """
    if len(scores) != table.num_rows:
        raise ValueError(f"{len(scores)} scores for {table.num_rows} trajectories")
    finite = [None if score is None or not np.isfinite(score) else float(score) for score in scores]
    columns: dict[str, Sequence[Any]] = {"score": finite, "truncated": truncated or [None] * table.num_rows}
    for name, values in columns.items():
        field = SCHEMA.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    return table


def with_parts(
    table: pa.Table,
    parts: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    truncated: Sequence[bool] | None = None,
) -> pa.Table:
    """Return the table with several parts' scores and their weighted sum.

    A part that is None or not finite is left out of its trajectory's sum; where all are, there is no score.

    Args:
        table: of `SCHEMA`.
        parts: one score per trajectory, by the part's name.
        weights: by the same names.
        truncated: as in `with_scores`.
    """
    known = {
        name: [score if score is not None and np.isfinite(score) else None for score in scores]
        for name, scores in parts.items()
    }
    columns = [pa.array(scores, pa.float32()) for scores in known.values()]
    together = pa.StructArray.from_arrays(columns, names=list(known))
    return with_scores(table, weigh_parts(known, weights), truncated).append_column("parts", together)


def weigh_parts(parts: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> list[float | None]:
    """Return the weighted sum of each trajectory's parts: of those that are not None; None where all are.

    Args:
        parts: one finite score or None per trajectory, by the part's name.
        weights: by the same names.
    """
    sums: list[float | None] = []
    for row in zip(*parts.values(), strict=True):
        terms = [weights[name] * score for name, score in zip(parts, row, strict=True) if score is not None]
        sums.append(sum(terms) if terms else None)
    return sums


def with_learned(table: pa.Table, figures: Mapping[str, Sequence[np.ndarray | None]]) -> pa.Table:
    """Return the table as `LEARNED_SCHEMA`, its extras behind.

    Args:
        table: of `SCHEMA`.
        figures: for each of `LEARNED_FIELDS` one `[R]` array (or None) per row.
    """
    columns = [table.column(field.name) for field in SCHEMA]
    columns += [pa.array(list(figures[name]), pa.list_(pa.float32())) for name in LEARNED_FIELDS]
    learned = pa.Table.from_arrays(columns, schema=LEARNED_SCHEMA)
    for name in table.column_names[len(SCHEMA) :]:
        learned = learned.append_column(name, table.column(name))
    return learned


def read(path: Path, columns: Sequence[str] | None = None, max_bytes: int | None = None) -> pa.Table:
    """Read a step's trajectories as a run wrote them, this version's or an older one's.

    Args:
        path: a file of the run's `trajectories/`; `RunFolder.read_step` reads it by its step.
        columns: of `LEARNED_SCHEMA` and `EXTRAS`, in the order wanted; None: all.
        max_bytes: that the whole file may unpack to; None: any number.

    Returns:
        The columns, those of `EXTRAS` where they are there. What an older version did not have is null.

    Raises:
        pa.ArrowInvalid: they are of an unknown version of the schema, or not what their version promises, or larger.
        OSError, pa.ArrowException: the file is not there, torn, or no Parquet file.
    """
    import pyarrow.parquet as pq

    wanted = [*LEARNED_SCHEMA.names, *EXTRAS] if columns is None else columns
    with pq.ParquetFile(path) as file:
        there, groups = file.schema_arrow, file.metadata
        version = (there.metadata or {}).get(b"ppo_ray.schema", b"none").decode(errors="replace")
        added = _ADDED_SINCE.get(version)
        if added is None:
            known = " and ".join(_ADDED_SINCE)
            raise pa.ArrowInvalid(f"{path.name}: schema version {version}; this ppo_ray reads the versions {known}")
        unpacked = sum(groups.row_group(number).total_byte_size for number in range(groups.num_row_groups))
        if max_bytes is not None and unpacked > max_bytes:
            raise pa.ArrowInvalid(f"{path.name}: it unpacks to {unpacked:,} bytes, more than {max_bytes:,}")
        names = [name for name in wanted if there.get_field_index(name) >= 0]
        for name in wanted:
            if (
                name in names
                and name in LEARNED_SCHEMA.names
                and there.field(name).type != LEARNED_SCHEMA.field(name).type
            ):
                raise pa.ArrowInvalid(f"{path.name}: column {name} is {there.field(name).type}")
            if name not in names and name not in added and name not in EXTRAS:
                raise pa.ArrowInvalid(f"{path.name}: it has no column {name}")
        table = file.read(names).combine_chunks()
    for name in names:
        if name in SCHEMA.names and not SCHEMA.field(name).nullable and table.column(name).null_count:
            raise pa.ArrowInvalid(f"{path.name}: column {name} has nulls")
    for name in (name for name in wanted if name not in names and name in added):
        field = LEARNED_SCHEMA.field(name)
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select([name for name in wanted if name in table.column_names])


def concat(shards: Sequence[pa.Table]) -> pa.Table:
    """Join shards in order without copying their buffers."""
    return pa.concat_tables(shards)
