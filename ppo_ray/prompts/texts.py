"""The texts or conversations that prompts are made of: which can be used, and how many cannot."""

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa
import xxhash

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.chat import holds_messages, parse_messages
from ppo_ray.prompts.columns import COLUMN, is_unicode
from ppo_ray.prompts.rows import Rows
from ppo_ray.prompts.sources import read_rows

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
        return self.rows.take(self.indices[places])

    def take_all(self) -> Iterator[pa.Table]:
        """Yield the columns of `prompts.keep` beside some texts after the other; nothing if there are none."""
        for start in range(0, len(self) if self.rows.kept is not None else 0, CHUNK):
            table = self.take(np.arange(start, min(start + CHUNK, len(self))))
            assert table is not None
            yield table

    def select(self, places: np.ndarray, left_out: LeftOut) -> "UsableTexts":
        """Return those at the given places."""
        return replace(self, indices=self.indices[places], left_out=left_out)

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        reasons = self._reasons()
        what = "conversations" if self.are_chats else "texts"
        return f"{len(self):,} {what} of {self.config.path}" + (f"; left out: {reasons}" if reasons else "")

    def describe_absence(self) -> str:
        """Return the message for a data set that has no usable text."""
        key, remedy = f"prompts.path={self.config.path}", "give texts"
        if self.left_out.long:
            key, remedy = f"prompts.max_tokens={self.config.max_tokens}", "raise it, or set prompts.too_long=keep_end"
        elif self.left_out.short:
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
            f"of more than {self.config.max_tokens} tokens": left_out.long,
            "without a token that the model knows": left_out.strange,
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def read_usable_texts(config: PromptsConfig, num_held_out: int) -> UsableTexts:
    """Read the texts longer than `min_chars`, each once, in the order of the data set.

    Texts that are blank or not valid Unicode are left out.

    Raises:
        InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left.
    """
    rows = read_rows(config)
    are_chats: bool | None = None
    counts = dict.fromkeys(("blank", "invalid", "short"), 0)
    usable, digests, row = array("q"), bytearray(), 0
    for texts, kept in rows.iterate():
        for raw, values in zip(texts, kept or itertools.repeat(None)):
            row += 1
            text = "" if raw is None else raw.decode(errors="surrogateescape")
            if not text.strip():
                counts["blank"] += 1
                continue
            if are_chats is None:
                are_chats = holds_messages([text])
            if not is_unicode(text):
                counts["invalid"] += 1
            elif len(text) <= config.min_chars:
                counts["short"] += 1
            else:
                if are_chats:
                    _check_conversation(config, text, row)
                usable.append(row - 1)
                content = text.encode() if values is None else f"{len(text)}:{text}{values}".encode()
                digests += xxhash.xxh3_128_digest(content)
    found = np.array(usable, np.int64)[_find_first(np.frombuffer(digests, np.uint64).reshape(-1, 2))]
    left_out = LeftOut(**counts, repeated=len(usable) - len(found))
    texts_left = UsableTexts(rows, found, left_out, config, bool(are_chats))
    check_count(texts_left, num_held_out)
    return texts_left


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
    if len(usable) <= num_held_out:
        raise InputError(
            f"evaluation.num_prompts={num_held_out}: leaves no prompt for training: {usable.describe()}; "
            f"set it to {len(usable) - 1} or less"
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
