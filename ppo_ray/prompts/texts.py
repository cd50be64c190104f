"""Reader of one column of texts from a file, a folder or a hub data set."""

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import pyarrow as pa

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import QUOTED, InputError

Texts = list[str | None]

_SHOWN = 20  # columns that a message names
_CSV_BLOCK = 64 << 20  # bytes that pyarrow parses at once; no row may be longer


@dataclass(frozen=True)
class LeftOut:
    """Counts of the texts that make no prompts; a text is counted under the first reason that it has."""

    blank: int = 0
    """White space, or no text at all."""
    invalid: int = 0
    """Not valid Unicode: bytes that are no UTF-8, or half a surrogate pair."""
    short: int = 0
    """Of at most `prompts.min_chars` characters."""
    repeated: int = 0
    """The same as an earlier one."""


@dataclass(frozen=True)
class UsableTexts:
    """The texts that prompts are made of."""

    texts: list[str]
    """Each once, in the order of the data set."""
    left_out: LeftOut
    """How many others there were."""
    config: PromptsConfig
    """The section of options that names the data set."""

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        reasons = self._reasons()
        return f"{len(self.texts):,} texts of {self.config.path}" + (f"; left out: {reasons}" if reasons else "")

    def describe_absence(self) -> str:
        """Return the message for a data set that has no usable text."""
        short, key, remedy = self.left_out.short, f"prompts.path={self.config.path}", "give texts"
        if short:
            key, remedy = f"prompts.min_chars={self.config.min_chars}", "lower it"
        total, reasons = sum(astuple(self.left_out)), self._reasons()
        left_out = f", left out: {reasons}" if reasons else ""
        return f"{key}: no prompt left: of {total:,} texts in {self.config.path}{left_out}; {remedy}"

    def _reasons(self) -> str:
        left_out = self.left_out
        reasons = {
            f"of at most {self.config.min_chars} characters": left_out.short,
            "blank": left_out.blank,
            "repeated": left_out.repeated,
            "not valid Unicode": left_out.invalid,
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def read_usable_texts(config: PromptsConfig, num_held_out: int) -> UsableTexts:
    """Read the texts longer than `min_chars`, each once, in the order of the data set.

    Texts that are blank or not valid Unicode are left out.

    Raises:
        InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left.
    """
    read = read_texts(config)
    worded = [text for text in read if text is not None and text.strip()]
    valid = [text for text in worded if is_unicode(text)]
    longer = [text for text in valid if len(text) > config.min_chars]
    texts = list(dict.fromkeys(longer))
    left_out = LeftOut(
        blank=len(read) - len(worded),
        invalid=len(worded) - len(valid),
        short=len(valid) - len(longer),
        repeated=len(longer) - len(texts),
    )
    usable = UsableTexts(texts, left_out, config)
    if not texts:
        raise InputError(usable.describe_absence())
    if len(texts) <= num_held_out:
        raise InputError(
            f"evaluation.num_prompts={num_held_out}: leaves no prompt for training: {usable.describe()}; "
            f"set it to {len(texts) - 1} or less"
        )
    return usable


def read_texts(config: PromptsConfig) -> Texts:
    """Read the texts of `config.column`; None where the data set has none.

    Bytes that are no UTF-8 are kept as lone surrogates (U+DC80 to U+DCFF): so they spoil only their own text, which can
    be told by `is_unicode`.

    Raises:
        InputError: there is no such data set, it cannot be read, or it has no such column of texts.
    """
    path = Path(config.path)
    reader = _READERS.get(path.suffix.lower())
    if reader and not path.is_dir():
        if not path.is_file():
            raise InputError(f"prompts.path={config.path}: no such file")
        try:
            return reader(path, config.column)
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise InputError(f"prompts.path={config.path}: cannot be read: {error}") from error
    return _read_dataset(config)


def _read_parquet(path: Path, column: str) -> Texts:
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    _check_column(path, schema.names, column)
    return _to_texts(path, pq.read_table(path, columns=[column]).column(column), column)


def _read_csv(path: Path, column: str) -> Texts:
    from pyarrow import csv

    read_options = csv.ReadOptions(block_size=_CSV_BLOCK)
    parse_options = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, read_options, parse_options) as reader:
        _check_column(path, reader.schema.names, column)
    # The other columns are not converted: a word among the numbers of one of them does not matter here.
    convert_options = csv.ConvertOptions(column_types={column: pa.large_binary()}, include_columns=[column])
    return _decode(csv.read_csv(path, read_options, parse_options, convert_options).column(column))


def _read_jsonl(path: Path, column: str) -> Texts:
    texts: Texts = []
    seen: dict[str, None] = {}
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                if not is_unicode(line):
                    texts.append(line)
                    continue
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            seen |= dict.fromkeys(row)
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                shown = repr(text)[:QUOTED]
                raise InputError(f"prompts.column={column}: line {number} of {path} holds {shown}, not text")
            texts.append(text)
    _check_column(path, list(seen), column)
    return texts


_Reader = Callable[[Path, str], Texts]
_READERS: dict[str, _Reader] = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}


def _read_dataset(config: PromptsConfig) -> Texts:
    """Read a folder or a hub data set through the `datasets` library."""
    import datasets

    is_folder = Path(config.path).is_dir()
    if not is_folder and config.path.startswith((".", "/")):
        raise InputError(f"prompts.path={config.path}: no such folder")
    try:
        dataset = datasets.load_dataset(config.path, split=config.split)
    except Exception as error:  # the library raises a dozen kinds, some of them its dependencies' own
        what, remedy = "the folder cannot be read as a data set", ""
        if not is_folder:
            what = "neither a file nor a folder here, and not to be had from the hub"
            remedy = "; without a hub give a .parquet, .jsonl or .csv file, or asset:prompts"
        where = f"prompts.path={config.path}, prompts.split={config.split}"
        raise InputError(f"{where}: {what}: {error}{remedy}") from error
    _check_column(config.path, dataset.column_names, config.column)
    return _to_texts(config.path, dataset.with_format("arrow")[config.column], config.column)


def _check_column(path: Path | str, columns: Sequence[str], column: str) -> None:
    if column not in columns:
        shown = ", ".join(name[:QUOTED] for name in columns[:_SHOWN]) or "none"
        more = f" and {len(columns) - _SHOWN:,} others" if len(columns) > _SHOWN else ""
        raise InputError(f"prompts.column={column}: {path} has no such column; it has {shown}{more}")


def _to_texts(path: Path | str, column: pa.ChunkedArray, name: str) -> Texts:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(f"prompts.column={name}: the column in {path} holds {column.type}, not text")
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return _decode(column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary()))


def _decode(column: pa.ChunkedArray) -> Texts:
    return [None if raw is None else raw.decode(errors="surrogateescape") for raw in column.to_pylist()]


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded; one that JSON or `read_texts` gave a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
