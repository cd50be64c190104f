"""The rows of a data set on the disk, mapped into memory: a data set may be larger than the memory.

What lies uncompressed in Arrow files stays where it is. All else is written to a file without a name in the folder of
temporary files (TMPDIR), which is gone when the process ends.
"""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ppo_ray.errors import InputError
from ppo_ray.machine import TIMES, max_memory_of_file

KEEP = "prompts.keep"
ROWS = 4096
"""Rows that are decoded or written at once."""
_ENTRY = 8  # bytes of an item of a column
_ALIGNMENT = 64  # bytes; Arrow copies what is not aligned


class Meter:
    """Count of the bytes that the texts of some files take."""

    def __init__(self, path: Path | str, size: int) -> None:
        """Set the limit.

        Args:
            path: of the files, for the message.
            size: of the files, bytes.
        """
        self.path, self._size, self._limit, self._held = path, size, max_memory_of_file(size), 0

    def add(self, num_bytes: int) -> None:
        """Count some more.

        Raises:
            InputError: it is more than the limit.
        """
        self._held += num_bytes
        if self._held > self._limit:
            raise InputError(
                f"prompts.path={self.path}: its {self._size:,} bytes unpack to more than {self._limit >> 20:,} MiB of "
                f"texts, more than {TIMES} times its size, and are not read; to use them write them less compressed"
            )


class Rows:
    """What was read, a row per prompt; the texts and kept columns are read from the disk when they are asked for."""

    def __init__(self, batches: Sequence[pa.RecordBatch], kept: pa.Schema | None) -> None:
        """Take the rows.

        Args:
            batches: first the texts as bytes or text, whichever way Arrow has them, then the kept columns.
            kept: the kept columns of all rows; a batch may have them in narrower types. None: none is kept.
        """
        self.batches = [batch for batch in batches if batch.num_rows]
        self.kept = kept
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def __len__(self) -> int:
        """Return how many there are."""
        return int(self._starts[-1])

    def iterate(self) -> Iterator[tuple[list[bytes | None], list[dict[str, Any]] | None]]:
        """Yield the texts of some rows after the other, None where there is none, and what is kept beside each.

        Raises:
            InputError: a kept value does not fit into the type that all files' values have together.
        """
        for batch in self.batches:
            for start in range(0, batch.num_rows, ROWS):
                part = batch.slice(start, ROWS)
                kept = None if self.kept is None else self._widen([part]).to_pylist()
                yield _to_bytes(part.column(0)), kept

    def read(self, indices: np.ndarray) -> list[bytes | None]:
        """Return the texts of the rows at these indices."""
        texts: list[bytes | None] = [None] * len(indices)
        for batch, inner, places in self._locate(indices):
            for place, text in zip(places, _to_bytes(batch.column(0).take(inner)), strict=True):
                texts[place] = text
        return texts

    def take(self, indices: np.ndarray) -> pa.Table | None:
        """Return the kept columns of the rows at these indices; None: none is kept."""
        if self.kept is None:
            return None
        parts, order = [], []
        for batch, inner, places in self._locate(indices):
            parts.append(batch.take(inner))
            order.append(places)
        return self._widen(parts).take(np.argsort(np.concatenate(order)) if order else [])

    def _locate(self, indices: np.ndarray) -> Iterator[tuple[pa.RecordBatch, pa.Array, np.ndarray]]:
        """Yield each batch that holds some of the rows, where they are in it, and their places among the indices."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            yield self.batches[number], pa.array(indices[places] - self._starts[number]), places

    def _widen(self, batches: Sequence[pa.RecordBatch]) -> pa.Table:
        """Return the kept columns of batches as one table of the types of all rows."""
        assert self.kept is not None
        tables = [pa.Table.from_batches([batch.select(range(1, batch.num_columns))]) for batch in batches]
        try:
            return pa.concat_tables([self.kept.empty_table(), *tables], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{KEEP}: a value does not fit into the columns {self.kept.names}: {error}") from error


class RowWriter:
    """Makes `Rows` of what a reader finds."""

    def __init__(
        self, names: Sequence[str], meter: Meter, is_mapped: Callable[[pa.Array], bool] = lambda column: False
    ) -> None:
        """Begin without a row.

        Args:
            names: of the kept columns, as the data set has them.
            meter: counts what is written.
            is_mapped: says whether a column lies in a file that is mapped into memory; it is not written again.
        """
        self._names, self._meter, self._is_mapped = [_last(name) for name in names], meter, is_mapped
        self._given = tuple(names)
        self._kept = pa.schema([(name, pa.null()) for name in self._names])
        self._batches: list[pa.RecordBatch | None] = []  # None: it is written
        self._file: Any = None
        self._stream: pa.RecordBatchStreamWriter | None = None
        self._segments: list[tuple[int, pa.Schema]] = []
        self._num_rows = 0

    def add(self, texts: pa.Array, kept: Sequence[pa.Array]) -> None:
        """Add rows of a column of texts or lists, and of the kept columns.

        Raises:
            InputError: kept values are not valid, or not of the type of those before; or all takes too much room.
        """
        columns = [self._check(column, name) for column, name in zip(kept, self._given, strict=True)]
        if is_text(texts.type) and all(map(self._is_mapped, [texts, *columns])):
            self._batches.append(self._join(texts, columns))
            return
        for start in range(0, len(texts), ROWS):
            self._write(_to_binary(texts.slice(start, ROWS)), [column.slice(start, ROWS) for column in columns])

    def add_values(self, texts: Sequence[str | None], kept: Sequence[Sequence[Any]]) -> None:
        """Add rows of texts and of Python values, at most `ROWS`; see `add`."""
        raw = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
        columns = [self._find_type(values, index) for index, values in enumerate(kept)]
        self._write(pa.array(raw, pa.large_binary()), columns)

    def finish(self) -> Rows:
        """Return all rows."""
        with self._explain_failure():
            written = iter(self._read_back())
        batches = [next(written) if batch is None else batch for batch in self._batches]
        return Rows(batches, self._kept if self._names else None)

    def _check(self, column: pa.Array, name: str) -> pa.Array:
        try:
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            column.validate(full=True)
        except (pa.ArrowException, UnicodeError) as error:
            raise self._misfit(name, error) from error
        return column

    def _find_type(self, values: Sequence[Any], index: int) -> pa.Array:
        """Make a column of values; the error names the first that does not fit to those before."""
        known = pa.schema([self._kept.field(index)])

        def fit(number: int) -> pa.Array:
            column = pa.array(values[:number])
            _unify(known, pa.schema([(self._names[index], column.type)]))
            column.validate(full=True)
            return column

        try:
            return fit(len(values))
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            low, high = 0, len(values)
            while low < high - 1:
                middle = (low + high) // 2
                try:
                    fit(middle)
                    low = middle
                except (pa.ArrowException, OverflowError, UnicodeError):
                    high = middle
            raise self._misfit(self._given[index], error, self._num_rows + low + 1) from error

    def _misfit(self, name: str, error: Exception, row: int | None = None) -> InputError:
        where = f"row {row} of " if row is not None else ""
        return InputError(f"{KEEP}={name}: {where}{self._meter.path} does not fit into the column: {error}")

    def _join(self, texts: pa.Array, kept: Sequence[pa.Array]) -> pa.RecordBatch:
        """Make a batch, and widen the types of all rows' kept columns to its own."""
        self._num_rows += len(texts)
        own = pa.schema([(name, column.type) for name, column in zip(self._names, kept, strict=True)])
        try:
            self._kept = _unify(self._kept, own)
        except pa.ArrowException as error:
            raise self._misfit(", ".join(self._given), error) from error
        return pa.RecordBatch.from_arrays([texts, *kept], names=["", *self._names])

    def _write(self, texts: pa.Array, kept: Sequence[pa.Array]) -> None:
        batch = self._join(texts, kept)
        dictionary = texts.dictionary.nbytes if pa.types.is_dictionary(texts.type) else texts.nbytes
        self._meter.add(_ENTRY * len(texts) + dictionary + sum(column.nbytes for column in kept))
        self._batches.append(None)
        with self._explain_failure():
            if self._file is None:
                self._file = tempfile.NamedTemporaryFile(prefix="ppo_ray-prompts-")  # noqa: SIM115
            if self._stream is None or self._segments[-1][1] != batch.schema:
                self._end_segment()
                self._segments.append((self._file.tell(), batch.schema))
                self._stream = pa.ipc.new_stream(pa.PythonFile(self._file, "w"), batch.schema)
            self._stream.write_batch(batch)

    def _end_segment(self) -> None:
        """End the stream of batches of one schema."""
        if self._stream is not None:
            self._stream.close()
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))

    def _read_back(self) -> list[pa.RecordBatch]:
        """Map what was written; the file loses its name."""
        if self._file is None:
            return []
        self._end_segment()
        self._file.flush()
        content = pa.memory_map(self._file.name).read_buffer()
        self._file.close()
        bounds = itertools.pairwise([*(start for start, _ in self._segments), content.size])
        return [batch for start, stop in bounds for batch in pa.ipc.open_stream(content[start:stop])]

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"prompts.path={self._meter.path}: its rows are kept in {tempfile.gettempdir()} while they are used, "
                f"and that failed: {error}; set TMPDIR to a folder with room for them"
            ) from error


def is_text(kind: pa.DataType) -> bool:
    """Say whether a column of this type, or the categories of one, is text that can be read where it lies."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _last(name: str) -> str:
    """Return the name that a kept column has from then on."""
    return name.rpartition(".")[2]


def _unify(known: pa.Schema, new: pa.Schema) -> pa.Schema:
    return known if known.equals(new) else pa.unify_schemas([known, new], promote_options="permissive")


def _to_binary(texts: pa.Array) -> pa.Array:
    """Return a part of a column of texts as bytes; categories are those of the part, and lists become JSON."""
    if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        rows = (row.as_py() for row in texts)
        return pa.array(
            [None if row is None else json.dumps(row, default=str).encode() for row in rows], pa.large_binary()
        )
    if pa.types.is_dictionary(texts.type):
        used = texts.indices.drop_null().unique()
        indices = pc.index_in(texts.indices, used)
        return pa.DictionaryArray.from_arrays(indices, _to_binary(texts.dictionary.take(used)))
    if pa.types.is_string_view(texts.type):
        texts = texts.cast(pa.large_string())
    return texts.cast(pa.large_binary())


def _to_bytes(texts: pa.Array) -> list[bytes | None]:
    """Return the texts of a part of a column; equal categories are one object."""
    texts = _to_binary(texts)
    if not pa.types.is_dictionary(texts.type):
        return texts.to_pylist()
    values = texts.dictionary.to_pylist()
    return [None if index is None else values[index] for index in texts.indices.to_pylist()]
