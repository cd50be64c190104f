"""Readers of prompts and of the columns that go with them from a file: Parquet, Arrow, JSON, CSV or plain lines.

What is wrong with other columns does not matter. A small file that unpacks to far more than its size is refused.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ppo_ray.errors import QUOTED, InputError
from ppo_ray.prompts.columns import COLUMN, Columns, check_column, is_unicode, pick_rows
from ppo_ray.prompts.rows import KEEP, ROWS, Meter, Rows, RowWriter

_CSV_BLOCK = 64 << 20  # bytes that pyarrow parses at once; no row may be longer
_LARGEST_PART = 4 << 20  # bytes of texts, about, that are in memory at once
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


def find_reader(path: Path) -> "Callable[[Columns], Rows] | None":
    """Return what reads columns of the file, by the file's name; None: the name does not tell what it holds.

    The reader raises InputError if the file cannot be read, or has no such columns.
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
    """Read these columns alone, a few rows at a time; equal texts of these are one entry, as in the file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = [".".join(found) for found in columns.find(path, file.schema_arrow)]
        prompts, groups = names[0], file.metadata
        leaves = [file.schema.column(number).path for number in range(len(file.schema.names))]
        size, largest = path.stat().st_size, 0
        for group in map(groups.row_group, range(groups.num_row_groups)):
            chunks = map(group.column, range(group.num_columns))
            unpacked = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in names)
            Meter(path, size).add(unpacked)  # a page of it is unpacked at once
            largest = max(largest, unpacked // max(group.num_rows, 1))
    num_rows = max(1, min(ROWS, _LARGEST_PART // max(largest, 1)))
    with pq.ParquetFile(path, read_dictionary=[prompts] if prompts in leaves else None, pre_buffer=False) as file:
        batches = file.iter_batches(num_rows, columns=list(dict.fromkeys(names)), use_threads=False)
        return pick_rows(file.schema_arrow, batches, columns, Meter(path, size))


def _read_arrow(path: Path, columns: Columns) -> Rows:
    """Read the file or stream format; what is not compressed stays in the file."""
    with pa.memory_map(str(path)) as source:
        content = source.read_buffer()
        try:
            reader = pa.ipc.open_file(content)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:
            batches = reader = pa.ipc.open_stream(content)
        first, last = content.address, content.address + content.size

        def is_mapped(column: pa.Array) -> bool:
            buffers = [buffer for buffer in column.buffers() if buffer is not None and buffer.size]
            return all(first <= buffer.address and buffer.address + buffer.size <= last for buffer in buffers)

        return pick_rows(reader.schema, batches, columns, Meter(path, content.size), is_mapped)


def _read_csv(path: Path, columns: Columns, delimiter: str = ",") -> Rows:
    """Read a block at a time; a kept column has the type of its values in the first."""
    from pyarrow import csv

    read_options = csv.ReadOptions(block_size=_CSV_BLOCK)
    parse_options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with _open_bytes(path) as source, csv.open_csv(source, read_options, parse_options) as reader:
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
    writer = RowWriter(columns.keep, Meter(path, path.stat().st_size))
    with _open_bytes(path) as source, csv.open_csv(source, read_options, parse_options, convert_options) as reader:
        for batch in reader:
            texts = batch.column(columns.prompts)
            kept = [
                texts.cast(pa.large_string()) if name == columns.prompts else batch.column(name)
                for name in columns.keep
            ]
            writer.add(texts, kept)
    return writer.finish()


def _read_tsv(path: Path, columns: Columns) -> Rows:
    return _read_csv(path, columns, "\t")


def _read_lines(path: Path, columns: Columns) -> Rows:
    """Read plain lines, each a text of the column `text`."""
    for name, option in ((columns.prompts, COLUMN), *((name, KEEP) for name in columns.keep)):
        check_column(path, ["text"], name, option)
    writer = RowWriter(columns.keep, Meter(path, path.stat().st_size))
    with _open(path) as lines:
        while texts := [line.rstrip("\n") for line in itertools.islice(lines, ROWS)]:
            writer.add_values(texts, [texts] * len(columns.keep))
    return writer.finish()


def _read_json(path: Path, columns: Columns) -> Rows:
    """Read an object per line, or one list of objects."""
    column = columns.prompts
    texts: list[str | None] = []
    kept: list[list[Any]] = [[] for _ in columns.keep]
    seen: dict[str, None] = {}
    writer = RowWriter(columns.keep, Meter(path, path.stat().st_size))
    size = 0
    with _open(path) as lines:
        for where, row, spoiled in _rows(lines):
            if spoiled:
                text, values = spoiled, [None] * len(columns.keep)
            else:
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is not a JSON object")
                seen |= dict.fromkeys(row)
                text, found = _look_up(row, column)
                if found:
                    seen[column] = None
                if text is not None and not isinstance(text, str | list):
                    shown = repr(text)[:QUOTED]
                    raise InputError(f"{COLUMN}={column}: {where} of {path} holds {shown}, neither text nor messages")
                text = json.dumps(text) if isinstance(text, list) else text
                values = []
                for name in columns.keep:
                    value, found = _look_up(row, name)
                    if found:
                        seen[name] = None
                    values.append(value)
            texts.append(text)
            size += len(text or "")
            for column_values, value in zip(kept, values, strict=True):
                column_values.append(value)
            if len(texts) == ROWS or size > _LARGEST_PART:
                writer.add_values(texts, kept)
                texts, kept, size = [], [[] for _ in columns.keep], 0
    writer.add_values(texts, kept)
    for name in columns.keep:
        check_column(path, list(seen), name, KEEP)
    check_column(path, list(seen), column)
    return writer.finish()


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
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", errors="surrogateescape")


def _open_bytes(path: Path) -> io.BufferedReader:
    """Open a file, and unpack what is compressed."""
    return io.BufferedReader(_Unpacked(path), 1 << 20)


class _Unpacked(io.RawIOBase):
    """A file, unpacked as it is read; counts what it is unpacked to."""

    def __init__(self, path: Path) -> None:
        self._source, self._meter = pa.input_stream(str(path)), Meter(path, path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._source.read(len(buffer))
        self._meter.add(len(content))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._source.close()
        super().close()


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
