"""One column of texts, decoded out of Arrow's: of any kind of text, and within a limit of memory.

A column of a struct is named by its path, `meta.text`. Bytes that are no UTF-8 are kept as lone surrogates (U+DC80 to
U+DCFF): so they spoil only their own text, and `is_unicode` tells.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError

Texts = list[str | None]

ROWS = 4096
"""Rows of a column that are decoded at once."""
_SHOWN = 20  # columns that a message names
_LEAST_LIMIT = 64 << 20  # bytes of memory that the texts of any file may take
_TIMES = 100  # its size that those of a larger file may take: lines of one letter, uncompressed, take sixty
_ENTRY = 8  # bytes of a list's item


class Meter:
    """Count of the memory that the texts of some files take."""

    def __init__(self, path: Path | str, size: int) -> None:
        """Set the limit.

        Args:
            path: of the files, for the message.
            size: of the files, bytes.
        """
        self._path, self._size, self._limit, self._held = path, size, max(_LEAST_LIMIT, _TIMES * size), 0

    def add(self, num_bytes: int) -> None:
        """Count some more.

        Raises:
            InputError: it is more than the limit.
        """
        self._held += num_bytes
        if self._held > self._limit:
            raise InputError(
                f"prompts.path={self._path}: its {self._size:,} bytes unpack to more than {self._limit >> 20:,} MiB of "
                f"texts, more than {_TIMES} times its size, and are not read; to use them write them less compressed"
            )

    def add_text(self, text: str | None) -> str | None:
        """Count an item of a list, and return it."""
        self.add(_ENTRY + sys.getsizeof(text))
        return text


def pick_texts(
    path: Path | str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], column: str, meter: Meter
) -> Texts:
    """Return the texts of a column, or of a struct's, of record batches.

    Raises:
        InputError: there is no such column of texts, or they take too much memory; the message names `path`.
    """
    import pyarrow.compute as pc

    first, *rest = find_column(path, schema, column)
    columns = (batch.column(first) for batch in batches)
    return to_texts(path, (pc.struct_field(found, rest) if rest else found for found in columns), column, meter)


def find_column(path: Path | str, schema: pa.Schema, column: str) -> list[str]:
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
        check_column(path, schema.names, column)
    return names


def _has_field(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0


def check_column(path: Path | str, columns: Sequence[str], column: str) -> None:
    """Refuse a name that is none of the columns.

    Raises:
        InputError: it is none; the message names some.
    """
    if column not in columns:
        shown = ", ".join(name[:QUOTED] for name in columns[:_SHOWN]) or "none"
        more = f" and {len(columns) - _SHOWN:,} others" if len(columns) > _SHOWN else ""
        raise InputError(f"prompts.column={column}: {path} has no such column; it has {shown}{more}")


def to_texts(path: Path | str, columns: Iterable[pa.Array], name: str, meter: Meter) -> Texts:
    """Return the texts of the parts of a column: strings of any kind, or a dictionary (a category) of such.

    Raises:
        InputError: the column holds something else, or its texts take too much memory.
    """
    texts: Texts = []
    known: dict[str | None, str | None] = {None: None}
    for column in columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not any(
            is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            raise InputError(f"prompts.column={name}: the column in {path} holds {column.type}, not text")
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
