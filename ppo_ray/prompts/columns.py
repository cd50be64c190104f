"""Columns of a data set: the texts or conversations of the prompts, and what goes with them, within a limit of memory.

A column of a struct is named by its path, `meta.text`. Bytes that are no UTF-8 are kept as lone surrogates (U+DC80 to
U+DCFF): so they spoil only their own text, and `is_unicode` tells. Lists, which are conversations, become JSON texts.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError
from ppo_ray.machine import TIMES, max_memory_of_file

Texts = list[str | None]

COLUMN, KEEP = "prompts.column", "prompts.keep"
ROWS = 4096
"""Rows of a column that are decoded at once."""
_SHOWN = 20  # columns that a message names
_ENTRY = 8  # bytes of a list's item


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a data set."""

    prompts: str
    """Texts, or conversations."""
    keep: tuple[str, ...] = ()
    """What else goes with each prompt."""

    def find(self, path: Path | str, schema: pa.Schema) -> list[list[str]]:
        """Return the names that lead to each column, the prompts' first; see `find_column`."""
        kept = [find_column(path, schema, name, KEEP) for name in self.keep]
        return [find_column(path, schema, self.prompts), *kept]


@dataclass(frozen=True)
class Rows:
    """What was read, a row per prompt."""

    texts: Texts
    """A conversation is its JSON; None where the data set has no text."""
    kept: pa.Table | None
    """The kept columns under the last part of their names; None: none is kept."""


class Meter:
    """Count of the memory that the texts of some files take."""

    def __init__(self, path: Path | str, size: int) -> None:
        """Set the limit.

        Args:
            path: of the files, for the message.
            size: of the files, bytes.
        """
        self._path, self._size, self._limit, self._held = path, size, max_memory_of_file(size), 0

    def add(self, num_bytes: int) -> None:
        """Count some more.

        Raises:
            InputError: it is more than the limit.
        """
        self._held += num_bytes
        if self._held > self._limit:
            raise InputError(
                f"prompts.path={self._path}: its {self._size:,} bytes unpack to more than {self._limit >> 20:,} MiB of "
                f"texts, more than {TIMES} times its size, and are not read; to use them write them less compressed"
            )

    def add_text(self, text: str | None) -> str | None:
        """Count an item of a list, and return it."""
        self.add(_ENTRY + sys.getsizeof(text))
        return text


def pick_rows(
    path: Path | str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], columns: Columns, meter: Meter
) -> Rows:
    """Return the columns of record batches, each by its name or by its path in structs.

    Raises:
        InputError: there is no such column, or no text in it, or they take too much memory; the message names `path`.
    """
    prompts, *others = columns.find(path, schema)
    kept: list[list[pa.Array]] = [[] for _ in others]

    def read_prompts() -> Iterator[pa.Array]:
        for batch in batches:
            for names, arrays in zip(others, kept, strict=True):
                arrays.append(_follow(batch, names))
                meter.add(arrays[-1].nbytes)
            yield _follow(batch, prompts)

    texts = to_texts(path, read_prompts(), columns.prompts, meter)
    tables = [pa.chunked_array(arrays or [pa.array([])]) for arrays in kept]
    return Rows(texts, make_table(path, columns.keep, tables))


def _follow(batch: pa.RecordBatch, names: Sequence[str]) -> pa.Array:
    import pyarrow.compute as pc

    first, *rest = names
    return pc.struct_field(batch.column(first), rest) if rest else batch.column(first)


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
    """Refuse a name that is none of the columns.

    Raises:
        InputError: it is none; the message names some.
    """
    if column not in columns:
        shown = ", ".join(name[:QUOTED] for name in columns[:_SHOWN]) or "none"
        more = f" and {len(columns) - _SHOWN:,} others" if len(columns) > _SHOWN else ""
        raise InputError(f"{option}={column}: {path} has no such column; it has {shown}{more}")


def to_texts(path: Path | str, columns: Iterable[pa.Array], name: str, meter: Meter) -> Texts:
    """Return the texts of the parts of a column: strings of any kind, a dictionary (a category) of such, or lists.

    Raises:
        InputError: the column holds something else, or its texts take too much memory.
    """
    texts: Texts = []
    known: dict[str | None, str | None] = {None: None}
    for column in columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            rows = (row.as_py() for row in column)
            texts += [meter.add_text(None if row is None else json.dumps(row, default=str)) for row in rows]
            continue
        if not any(
            is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            raise InputError(f"{COLUMN}={name}: the column in {path} holds {column.type}, neither text nor messages")
        if pa.types.is_string_view(column.type):
            column = column.cast(pa.large_string())
        for start in range(0, len(column), ROWS):
            part = column.slice(start, ROWS)
            meter.add(_ENTRY * len(part))
            part = part if pa.types.is_dictionary(part.type) else part.dictionary_encode()
            used = part.indices.drop_null().unique()
            values = _decode_values(part.dictionary.take(used))
            for value in values:
                if value not in known:
                    known[value] = value
                    meter.add(sys.getsizeof(value))
            meaning = dict(zip(used.to_pylist(), values, strict=True))
            texts += [None if index is None else known[meaning[index]] for index in part.indices.to_pylist()]
    return texts


def _decode_values(values: pa.Array) -> Texts:
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return decode(values.cast(pa.large_binary()))


def decode(column: pa.Array) -> Texts:
    """Return the texts of a column of bytes."""
    return [None if raw is None else raw.decode(errors="surrogateescape") for raw in column.to_pylist()]


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded; one that JSON or a reader gave a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
