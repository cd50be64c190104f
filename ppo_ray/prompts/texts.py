"""The texts or conversations that prompts are made of: which can be used, and how many cannot."""

import contextlib
import itertools
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa
import xxhash

from ppo_ray.config import SOURCE, PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.chat import holds_messages, parse_messages
from ppo_ray.prompts.columns import COLUMN, is_unicode
from ppo_ray.prompts.order import count_held_out
from ppo_ray.prompts.rows import Rows
from ppo_ray.prompts.sources import join_rows, read_rows

CHUNK = 1024
"""Texts that are in memory at once."""


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
    """The same as an earlier one, with the same values in the kept columns."""
    long: int = 0
    """Of more than `prompts.max_tokens` tokens, where such prompts are dropped."""
    strange: int = 0
    """Of which the tokenizer makes no ids, or ids that the model does not know; counted where whole texts are taken."""


@dataclass(frozen=True)
class UsableTexts:
    """The texts that prompts are made of, each once, in the order of the data set; they are read when asked for."""

    rows: Rows
    """Of the data set."""
    indices: np.ndarray
    """`[N]` int64, which rows these are."""
    left_out: LeftOut
    """How many others there were."""
    config: PromptsConfig
    """The section of options that names the data set."""
    sources: np.ndarray
    """`[N]` int16, the number of each text's source in `prompts.sources`; 0 where there are none."""
    are_chats: bool = False
    """Whether the texts are conversations; each is then the JSON of its messages."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.indices)

    def __iter__(self) -> Iterator[str]:
        """Yield all of them in order."""
        for start in range(0, len(self), CHUNK):
            yield from self.read(np.arange(start, min(start + CHUNK, len(self))))

    def read(self, places: np.ndarray) -> list[str]:
        """Return the texts at these places among them."""
        return [(raw or b"").decode() for raw in self.rows.read(self.indices[places])]

    def take(self, places: np.ndarray) -> pa.Table | None:
        """Return the columns of `prompts.keep` beside the texts at these places; None: there are none."""
        kept = self.rows.take(self.indices[places])
        if not self.config.sources or SOURCE not in self.config.keep:
            return kept
        names = [source.name for source in self.config.sources]
        columns = {} if kept is None else {name: kept.column(name) for name in kept.column_names}
        columns[SOURCE] = pa.array([names[number] for number in self.sources[places]], pa.string())
        return pa.table({name: columns[name] for name in self.config.kept_names})

    def take_all(self) -> Iterator[pa.Table]:
        """Yield the columns of `prompts.keep` beside some texts after the other; nothing if there are none."""
        for start in range(0, len(self) if self.config.keep else 0, CHUNK):
            table = self.take(np.arange(start, min(start + CHUNK, len(self))))
            assert table is not None
            yield table

    def select(self, places: np.ndarray, left_out: LeftOut) -> "UsableTexts":
        """Return those at the given places."""
        return replace(self, indices=self.indices[places], sources=self.sources[places], left_out=left_out)

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        reasons = self._reasons()
        what = "conversations" if self.are_chats else "texts"
        place = self.config.place
        if self.config.sources:
            counts = np.bincount(self.sources, minlength=len(self.config.sources)).tolist()
            names = [source.name for source in self.config.sources]
            place = ", ".join(f"{name} ({count:,})" for name, count in zip(names, counts, strict=True))
        return f"{len(self):,} {what} of {place}" + (f"; left out: {reasons}" if reasons else "")

    def describe_absence(self) -> str:
        """Return the message for a data set that has no usable text."""
        key, remedy = f"prompts.path={self.config.place}", "give texts"
        if self.left_out.long:
            key, remedy = f"prompts.max_tokens={self.config.max_tokens}", "raise it, or set prompts.too_long=keep_end"
        elif self.left_out.short:
            key, remedy = f"prompts.min_chars={self.config.min_chars}", "lower it"
        total, reasons = sum(astuple(self.left_out)), self._reasons()
        left_out = f", left out: {reasons}" if reasons else ""
        return f"{key}: no prompt left: of {total:,} texts in {self.config.place}{left_out}; {remedy}"

    def _reasons(self) -> str:
        left_out = self.left_out
        reasons = {
            f"of at most {self.config.min_chars} characters": left_out.short,
            "blank": left_out.blank,
            "repeated": left_out.repeated,
            "not valid Unicode": left_out.invalid,
            f"of more than {self.config.max_tokens} tokens": left_out.long,
            "without a token that the model knows": left_out.strange,
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def read_usable_texts(config: PromptsConfig, num_held_out: int, *, key: str = "prompts") -> UsableTexts:
    """Read the texts longer than `min_chars`, each once, in the order of the data set or of the mixture's.

    Texts that are blank or not valid Unicode are left out.

    Args:
        config: which texts.
        num_held_out: how many of them there must be more than.
        key: of the options that name the data set, for errors.

    Raises:
        InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left.
    """
    found = _Found()
    wanted = [part_key if key == "prompts" else key for part_key, _ in config.parts]
    read = []
    for name, (_, part) in zip(wanted, config.parts, strict=True):
        with _name_source(name):
            read.append(read_rows(part))
    rows = join_rows(config, read)
    for number, (name, (_, part)) in enumerate(zip(wanted, config.parts, strict=True)):
        with _name_source(name):
            found.add(part, Rows(read[number].batches, rows.kept), number)
    if len(found.kinds) > 1:
        raise InputError(f"prompts.sources={config.place}: some hold messages and some plain texts; give one kind")
    is_first = _find_first(np.frombuffer(found.digests, np.uint64).reshape(-1, 2))
    left_out = LeftOut(**found.counts, repeated=int((~is_first).sum()))
    usable = UsableTexts(
        rows,
        np.array(found.indices, np.int64)[is_first],
        left_out,
        config,
        np.array(found.sources, np.int16)[is_first],
        True in found.kinds,
    )
    check_count(usable, num_held_out)
    return usable


def count_shared(sets: Mapping[str, UsableTexts], others: UsableTexts) -> dict[str, int]:
    """Return how many texts of each set are among the others too, whatever their kept columns; reads these once."""
    missing = {name: {_digest(text) for text in texts} for name, texts in sets.items()}
    sizes = {name: len(digests) for name, digests in missing.items()}
    for digest in map(_digest, others if sets else ()):
        for digests in missing.values():
            digests.discard(digest)
    return {name: size - len(missing[name]) for name, size in sizes.items()}


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode())


@contextlib.contextmanager
def _name_source(key: str) -> Iterator[None]:
    """Name the options of the data set in errors by the key that they have."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"\bprompts\.(path|revision|subset|split|column)=", rf"{key}.\1=", str(error))
        raise InputError(text) from error


class _Found:
    """What is found in one data set after the other."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("blank", "invalid", "short"), 0)
        self.indices, self.sources, self.digests = array("q"), array("h"), bytearray()
        self.kinds: set[bool] = set()
        """Whether texts are conversations."""
        self._num_rows = 0

    def add(self, config: PromptsConfig, rows: Rows, source: int) -> None:
        """Look at all rows of a data set.

        Raises:
            InputError: one is not what it must be.
        """
        are_chats: bool | None = None
        row = 0
        for texts, kept in rows.iterate():
            for raw, values in zip(texts, kept or itertools.repeat(None), strict=False):
                row += 1
                text = "" if raw is None else raw.decode(errors="surrogateescape")
                if not text.strip():
                    self.counts["blank"] += 1
                    continue
                if are_chats is None:
                    are_chats = holds_messages([text])
                if not is_unicode(text):
                    self.counts["invalid"] += 1
                elif len(text) <= config.min_chars:
                    self.counts["short"] += 1
                else:
                    if are_chats:
                        _check_conversation(config, text, row)
                    self.indices.append(self._num_rows + row - 1)
                    self.sources.append(source)
                    content = text.encode() if values is None else f"{len(text)}:{text}{values}".encode()
                    self.digests += xxhash.xxh3_128_digest(content)
        self.kinds |= set() if are_chats is None else {are_chats}
        self._num_rows += row


def _find_first(digests: np.ndarray) -> np.ndarray:
    """Say which are the first with their digest: `[N]` bool.

    Args:
        digests: `[N, 2]` uint64.
    """
    order = np.lexsort(digests.T)  # stable: of equal ones the first stays the first
    is_first = np.ones(len(digests), bool)
    is_first[order[1:]] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    return is_first


def check_count(usable: UsableTexts, num_held_out: int) -> None:
    """Check that something is left to train on.

    Raises:
        InputError: there are fewer than `num_held_out + 1` texts.
    """
    if not len(usable):
        raise InputError(usable.describe_absence())
    quotas = usable.config.quotas
    sizes = np.bincount(usable.sources, minlength=len(quotas)).tolist()
    for number, (size, taken) in enumerate(zip(sizes, count_held_out(quotas, num_held_out), strict=True)):
        if size > taken:
            continue
        if len(quotas) > 1:
            source = usable.config.sources[number]
            raise InputError(
                f"prompts.sources[{number}]: {source.name} has {size:,} usable texts, and {taken:,} of them are held "
                f"out (evaluation.num_prompts={num_held_out}): none is left for training; {usable.describe()}"
            )
        raise InputError(
            f"evaluation.num_prompts={num_held_out}: leaves no prompt for training: {usable.describe()}; "
            f"set it to {size - 1} or less"
        )


def _check_conversation(config: PromptsConfig, text: str, row: int) -> None:
    """Check that the text of a row is a conversation that a response can be sampled for."""
    if config.chat_template == "none":
        raise InputError(
            f"prompts.chat_template=none: {COLUMN}={config.column} of {config.path} holds messages, which need one"
        )
    if config.min_tokens is not None:
        raise InputError(
            f"prompts.min_tokens={config.min_tokens}: {COLUMN}={config.column} of {config.path} holds messages, and a "
            "conversation is a prompt as a whole; set it to null"
        )
    if config.too_long == "cut":
        raise InputError(
            "prompts.too_long=cut: would cut off where the assistant's answer begins; set drop or keep_end for messages"
        )
    try:
        parse_messages(text)
    except ValueError as error:
        raise InputError(f"{COLUMN}={config.column}: row {row} of {config.path} {error}") from error
