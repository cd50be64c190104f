"""Readers of one column of texts from a file: Parquet, Arrow, JSON, CSV or plain lines.

A column of a struct is named by its path, `meta.text`. What is wrong with other columns does not matter. Bytes that are
no UTF-8 are kept as lone surrogates (U+DC80 to U+DCFF): so they spoil only their own text, and `is_unicode` tells.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError

Texts = list[str | None]

_SHOWN = 20  # columns that a message names
_CSV_BLOCK = 64 << 20  # bytes that pyarrow parses at once; no row may be longer
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


def find_reader(path: Path) -> "Callable[[str], Texts] | None":
    """Return what reads a column of the file, by the file's name; None: the name does not tell what it holds.

    The reader raises InputError if the file cannot be read, or has no such column of texts.
    """
    name = path.name.lower()
    suffix = Path(name).suffix
    if suffix in _COMPRESSED:
        suffix = Path(name.removesuffix(suffix)).suffix
        reader = _TEXTUAL.get(suffix)
    else:
        reader = _TEXTUAL.get(suffix) or _BINARY.get(suffix)
    if reader is None:
        return None

    def read(column: str) -> Texts:
        if not path.is_file():
            raise InputError(f"prompts.path={path}: no such file")
        try:
            return reader(path, column)
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise InputError(f"prompts.path={path}: cannot be read: {error}") from error

    return read


def describe_formats() -> str:
    """Say which files can be read."""
    return f"{', '.join(_BINARY)}, or {', '.join(_TEXTUAL)}, and these with {', '.join(_COMPRESSED)} behind"


def pick_texts(path: Path | str, table: pa.Table, column: str) -> Texts:
    """Return the texts of a column of a table, or of a struct's.

    Raises:
        InputError: there is no such column of texts; the message names `path`.
    """
    import pyarrow.compute as pc

    first, *rest = find_column(path, table.schema, column)
    found = table.column(first)
    return to_texts(path, pc.struct_field(found, rest) if rest else found, column)


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
        _check_column(path, schema.names, column)
    return names


def _has_field(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0


def _check_column(path: Path | str, columns: Sequence[str], column: str) -> None:
    if column not in columns:
        shown = ", ".join(name[:QUOTED] for name in columns[:_SHOWN]) or "none"
        more = f" and {len(columns) - _SHOWN:,} others" if len(columns) > _SHOWN else ""
        raise InputError(f"prompts.column={column}: {path} has no such column; it has {shown}{more}")


def to_texts(path: Path | str, column: pa.ChunkedArray, name: str) -> Texts:
    """Return the texts of a column: strings of any kind, or a dictionary (a category) of such.

    Raises:
        InputError: the column holds something else.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise InputError(f"prompts.column={name}: the column in {path} holds {column.type}, not text")
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return _decode(column.cast(pa.large_binary()))


def _decode(column: pa.ChunkedArray) -> Texts:
    return [None if raw is None else raw.decode(errors="surrogateescape") for raw in column.to_pylist()]


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded; one that JSON or a reader gave a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, column: str) -> Texts:
    import pyarrow.parquet as pq

    find_column(path, pq.read_schema(path), column)
    return to_texts(path, pq.read_table(path, columns=[column]).column(0), column)


def _read_arrow(path: Path, column: str) -> Texts:
    """Read the file or stream format."""
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        return pick_texts(path, table, column)


def _read_csv(path: Path, column: str, delimiter: str = ",") -> Texts:
    from pyarrow import csv

    read_options = csv.ReadOptions(block_size=_CSV_BLOCK)
    parse_options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(path, read_options, parse_options) as reader:
        _check_column(path, reader.schema.names, column)
    # The other columns are not converted: a word among the numbers of one of them does not matter here.
    convert_options = csv.ConvertOptions(column_types={column: pa.large_binary()}, include_columns=[column])
    return _decode(csv.read_csv(path, read_options, parse_options, convert_options).column(column))


def _read_tsv(path: Path, column: str) -> Texts:
    return _read_csv(path, column, "\t")


def _read_lines(path: Path, column: str) -> Texts:
    """Read plain lines, each a text of the column `text`."""
    _check_column(path, ["text"], column)
    with _open(path) as lines:
        return [line.rstrip("\n") for line in lines]


def _read_json(path: Path, column: str) -> Texts:
    """Read an object per line, or one list of objects."""
    texts: Texts = []
    seen: dict[str, None] = {}
    with _open(path) as lines:
        for where, row, spoiled in _rows(lines):
            if spoiled:
                texts.append(spoiled)
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object")
            seen |= dict.fromkeys(row)
            text, found = _look_up(row, column)
            if found:
                seen[column] = None
            if text is not None and not isinstance(text, str):
                shown = repr(text)[:QUOTED]
                raise InputError(f"prompts.column={column}: {where} of {path} holds {shown}, not text")
            texts.append(text)
    _check_column(path, list(seen), column)
    return texts


def _rows(lines: io.TextIOWrapper) -> Iterator[tuple[str, Any, str]]:
    """Yield words for where a JSON value is, the value, and the line if it is no JSON because it is no Unicode."""
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        if is_first and line.lstrip().startswith("["):
            rows = _parse(line + lines.read(), "the file")
            yield from ((f"item {item}", row, "") for item, row in enumerate(rows, 1))
            return
        is_first = False
        try:
            row = _parse(line, where)
        except ValueError:
            if is_unicode(line):
                raise
            yield where, None, line
        else:
            yield where, row, ""


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}; give an object per line, or one list of objects") from error


def _look_up(row: dict[str, Any], column: str) -> tuple[Any, bool]:
    """Return a column's value in a row, and whether the row has that column; both by its path, if it is in objects."""
    if column in row:
        return row[column], True
    *names, last = column.split(".")
    inner: Any = row
    for name in names:
        inner = inner.get(name) if isinstance(inner, dict) else None
    return (inner[last], True) if isinstance(inner, dict) and last in inner else (None, False)


def _open(path: Path) -> io.TextIOWrapper:
    """Open a file of text, which may be compressed."""
    return io.TextIOWrapper(pa.input_stream(str(path)), encoding="utf-8-sig", errors="surrogateescape")


_Reader = Callable[[Path, str], Texts]
_BINARY: dict[str, _Reader] = {".parquet": _read_parquet, ".arrow": _read_arrow}
_TEXTUAL: dict[str, _Reader] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_lines,
}
