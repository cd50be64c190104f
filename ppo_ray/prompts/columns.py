"""Columns of a data set: the texts or conversations of the prompts, and what goes with them.

A column of a struct is named by its path, `meta.text`. Bytes that are no UTF-8 are kept as they are: so they spoil only
their own text. Lists, which are conversations, become JSON texts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError
from ppo_ray.prompts.rows import KEEP, Meter, Rows, RowWriter, is_text

COLUMN = "prompts.column"
_SHOWN = 20  # columns that a message names


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


def pick_rows(
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    columns: Columns,
    meter: Meter,
    is_mapped: Callable[[pa.Array], bool] = lambda column: False,
) -> Rows:
    """Return the columns of record batches, each by its name or by its path in structs.

    Args:
        schema: of the batches.
        batches: the data set; one after the other is in memory.
        columns: which.
        meter: counts what is written of them.
        is_mapped: as in `RowWriter`.

    Raises:
        InputError: there is no such column, or no text in it, or they take too much room.
    """
    prompts, *others = columns.find(meter.path, schema)
    writer = RowWriter(columns.keep, meter, is_mapped)
    for batch in batches:
        texts = _follow(batch, prompts)
        _check_text(meter.path, columns.prompts, texts.type)
        writer.add(texts, [_follow(batch, names) for names in others])
    return writer.finish()


def _follow(batch: pa.RecordBatch, names: Sequence[str]) -> pa.Array:
    import pyarrow.compute as pc

    first, *rest = names
    return pc.struct_field(batch.column(first), rest) if rest else batch.column(first)


def _check_text(path: Path | str, name: str, kind: pa.DataType) -> None:
    if not (
        is_text(kind)
        or pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_string_view(kind.value_type if pa.types.is_dictionary(kind) else kind)
    ):
        raise InputError(f"{COLUMN}={name}: the column in {path} holds {kind}, neither text nor messages")


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


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded; one that a reader gave a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
