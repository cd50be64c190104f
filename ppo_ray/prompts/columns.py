"""Columns of a data set: the texts or conversations that prompts are made of, and the columns that go with them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError

Texts = list[str | None]

COLUMN, KEEP = "prompts.column", "prompts.keep"
_SHOWN = 20  # columns that a message names


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a data set."""

    prompts: str
    """Texts, or conversations."""
    keep: tuple[str, ...] = ()
    """What else goes with each prompt."""


@dataclass(frozen=True)
class Rows:
    """What was read, a row per prompt."""

    texts: Texts
    """A conversation is its JSON; None where the data set has no text."""
    kept: pa.Table | None
    """The kept columns under the last part of their names; None: none is kept."""


def pick_rows(path: Path | str, table: pa.Table, columns: Columns) -> Rows:
    """Return the columns of a table, each by its name or by its path in structs.

    Raises:
        InputError: there is no such column, or no text in it; the message names `path`.
    """
    texts = to_texts(path, _pick_column(path, table, columns.prompts, COLUMN), columns.prompts)
    kept = [_pick_column(path, table, name, KEEP) for name in columns.keep]
    return Rows(texts, make_table(path, columns.keep, kept))


def _pick_column(path: Path | str, table: pa.Table, column: str, option: str) -> pa.ChunkedArray:
    import pyarrow.compute as pc

    first, *rest = find_column(path, table.schema, column, option)
    found = table.column(first)
    return pc.struct_field(found, rest) if rest else found


def make_table(path: Path | str, names: Sequence[str], columns: Sequence[Any]) -> pa.Table | None:
    """Make the table of kept columns.

    Args:
        path: of the data set.
        names: of the columns, by which the data set has them.
        columns: Arrow arrays, or Python values whose common type is found out.

    Raises:
        InputError: the values have no common type, or a text is not valid Unicode.
    """
    if not names:
        return None
    made = {}
    for name, column in zip(names, columns, strict=True):
        try:
            array = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([pa.array(column)])
            if pa.types.is_dictionary(array.type):
                array = array.cast(array.type.value_type)
            array.validate(full=True)
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            row = "" if isinstance(column, pa.ChunkedArray) else f"row {_count_fitting(column) + 1} of "
            raise InputError(f"{KEEP}={name}: {row}{path} does not fit into the column: {error}") from error
        made[name.rpartition(".")[2]] = array
    return pa.table(made)


def _count_fitting(values: Sequence[Any]) -> int:
    """Return how many of the first values have a common type."""
    low, high = 0, len(values)
    while low < high - 1:
        middle = (low + high) // 2
        try:
            pa.array(values[:middle])
            low = middle
        except (pa.ArrowException, OverflowError, UnicodeError):
            high = middle
    return low


def find_column(path: Path | str, schema: pa.Schema, column: str, option: str = COLUMN) -> list[str]:
    """Return the names that lead to a column: its own, or those of the structs around it before it.

    Raises:
        InputError: there is no such column.
    """
    if column in schema.names:
        return [column]
    first, *rest = names = column.split(".")
    inner = schema.field(first).type if rest and schema.names.count(first) == 1 else None
    for name in rest:
        inner = inner.field(name).type if inner is not None and _has_field(inner, name) else None
    if inner is None:
        check_column(path, schema.names, column, option)
    return names


def _has_field(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0


def check_column(path: Path | str, columns: Sequence[str], column: str, option: str = COLUMN) -> None:
    """Refuse a column that is not among those of a data set."""
    if column not in columns:
        shown = ", ".join(name[:QUOTED] for name in columns[:_SHOWN]) or "none"
        more = f" and {len(columns) - _SHOWN:,} others" if len(columns) > _SHOWN else ""
        raise InputError(f"{option}={column}: {path} has no such column; it has {shown}{more}")


def to_texts(path: Path | str, column: pa.ChunkedArray, name: str) -> Texts:
    """Return the texts of a column: strings of any kind, a dictionary (a category) of such, or lists as JSON.

    Raises:
        InputError: the column holds something else.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [None if row is None else json.dumps(row, default=str) for row in column.to_pylist()]
    if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise InputError(f"{COLUMN}={name}: the column in {path} holds {column.type}, neither text nor messages")
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return decode(column.cast(pa.large_binary()))


def decode(column: pa.ChunkedArray) -> Texts:
    """Decode a column of bytes; what is no UTF-8 becomes lone surrogates."""
    return [None if raw is None else raw.decode(errors="surrogateescape") for raw in column.to_pylist()]


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded; one that JSON or a reader gave a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
