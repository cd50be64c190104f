"""Readers of prompts and of the columns that go with them from a file: Parquet, Arrow, JSON, CSV or plain lines.

A column of a struct is named by its path, `meta.text`. What is wrong with other columns does not matter. Bytes that are
no UTF-8 are kept as lone surrogates (U+DC80 to U+DCFF): so they spoil only their own text, and `is_unicode` tells.
Lists, which are conversations, become JSON texts.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError
from ppo_ray.prompts.columns import (
    COLUMN,
    KEEP,
    Columns,
    Rows,
    Texts,
    check_column,
    decode,
    find_column,
    is_unicode,
    make_table,
    pick_rows,
)

_CSV_BLOCK = 64 << 20  # bytes that pyarrow parses at once; no row may be longer
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


def find_reader(path: Path) -> "Callable[[Columns], Rows] | None":
    """Return what reads columns of the file, by the file's name; None: the name does not tell what it holds.

    The reader raises InputError if the file cannot be read, or has no such column.
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

    def read(columns: Columns) -> Rows:
        if not path.is_file():
            raise InputError(f"prompts.path={path}: no such file")
        try:
            return reader(path, columns)
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise InputError(f"prompts.path={path}: cannot be read: {error}") from error

    return read


def describe_formats() -> str:
    """Say which files can be read."""
    return f"{', '.join(_BINARY)}, or {', '.join(_TEXTUAL)}, and these with {', '.join(_COMPRESSED)} behind"


def _read_parquet(path: Path, columns: Columns) -> Rows:
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    wanted = [(columns.prompts, COLUMN), *((name, KEEP) for name in columns.keep)]
    names = list(dict.fromkeys(".".join(find_column(path, schema, name, option)) for name, option in wanted))
    table = pq.read_table(path, columns=names)
    return pick_rows(path, table.rename_columns(names), columns)  # what lies in a struct has lost its path


def _read_arrow(path: Path, columns: Columns) -> Rows:
    """Read the file or stream format."""
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        return pick_rows(path, table, columns)


def _read_csv(path: Path, columns: Columns, delimiter: str = ",") -> Rows:
    from pyarrow import csv

    read_options = csv.ReadOptions(block_size=_CSV_BLOCK)
    parse_options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(path, read_options, parse_options) as reader:
        names = reader.schema.names
    for name in columns.keep:
        check_column(path, names, name, KEEP)
    check_column(path, names, columns.prompts)
    # The other columns are not converted: a word among the numbers of one of them does not matter here.
    convert_options = csv.ConvertOptions(
        column_types={columns.prompts: pa.large_binary()},
        include_columns=list(dict.fromkeys([columns.prompts, *columns.keep])),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    table = csv.read_csv(path, read_options, parse_options, convert_options)
    texts = decode(table.column(columns.prompts))
    kept = [pa.chunked_array([texts]) if name == columns.prompts else table.column(name) for name in columns.keep]
    return Rows(texts, make_table(path, columns.keep, kept))


def _read_tsv(path: Path, columns: Columns) -> Rows:
    return _read_csv(path, columns, "\t")


def _read_lines(path: Path, columns: Columns) -> Rows:
    """Read plain lines, each a text of the column `text`."""
    for name, option in ((columns.prompts, COLUMN), *((name, KEEP) for name in columns.keep)):
        check_column(path, ["text"], name, option)
    with _open(path) as lines:
        texts: Texts = [line.rstrip("\n") for line in lines]
    return Rows(texts, make_table(path, columns.keep, [texts] * len(columns.keep)))


def _read_json(path: Path, columns: Columns) -> Rows:
    """Read an object per line, or one list of objects."""
    column = columns.prompts
    texts: Texts = []
    kept: list[list[Any]] = [[] for _ in columns.keep]
    seen: dict[str, None] = {}
    with _open(path) as lines:
        for where, row, spoiled in _rows(lines):
            if spoiled:
                texts.append(spoiled)
                for values in kept:
                    values.append(None)
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object")
            seen |= dict.fromkeys(row)
            text, found = _look_up(row, column)
            if found:
                seen[column] = None
            if text is not None and not isinstance(text, str | list):
                shown = repr(text)[:QUOTED]
                raise InputError(f"{COLUMN}={column}: {where} of {path} holds {shown}, neither text nor messages")
            texts.append(json.dumps(text) if isinstance(text, list) else text)
            for name, values in zip(columns.keep, kept, strict=True):
                value, found = _look_up(row, name)
                if found:
                    seen[name] = None
                values.append(value)
    for name in columns.keep:
        check_column(path, list(seen), name, KEEP)
    check_column(path, list(seen), column)
    return Rows(texts, make_table(path, columns.keep, kept))


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


_Reader = Callable[[Path, Columns], Rows]
_BINARY: dict[str, _Reader] = {".parquet": _read_parquet, ".arrow": _read_arrow}
_TEXTUAL: dict[str, _Reader] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_lines,
}
