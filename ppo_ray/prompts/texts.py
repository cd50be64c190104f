"""The texts or conversations that prompts are made of: which can be used, and how many cannot."""

from dataclasses import astuple, dataclass, replace
from typing import Any

import pyarrow as pa

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompts.chat import holds_messages, parse_messages
from ppo_ray.prompts.columns import COLUMN, is_unicode
from ppo_ray.prompts.sources import read_rows


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
    """The texts that prompts are made of."""

    texts: list[str]
    """Each once, in the order of the data set; a conversation is the JSON of its messages."""
    left_out: LeftOut
    """How many others there were."""
    config: PromptsConfig
    """The section of options that names the data set."""
    are_chats: bool = False
    """Whether the texts are conversations."""
    kept: pa.Table | None = None
    """The columns of `prompts.keep`, a row per text; None: there are none."""

    def select(self, indices: list[int], left_out: LeftOut) -> "UsableTexts":
        """Return those at the given places."""
        kept = None if self.kept is None else self.kept.take(indices)
        return replace(self, texts=[self.texts[index] for index in indices], kept=kept, left_out=left_out)

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        reasons = self._reasons()
        what = "conversations" if self.are_chats else "texts"
        return f"{len(self.texts):,} {what} of {self.config.path}" + (f"; left out: {reasons}" if reasons else "")

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
    are_chats = holds_messages(rows.texts)
    read = list(enumerate(rows.texts))
    worded = [(index, text) for index, text in read if text is not None and text.strip()]
    valid = [(index, text) for index, text in worded if is_unicode(text)]
    longer = [(index, text) for index, text in valid if len(text) > config.min_chars]
    if are_chats:
        _check_conversations(config, longer)
    values = None if rows.kept is None else rows.kept.to_pylist()
    first: dict[Any, int] = {}
    for index, text in longer:
        first.setdefault(text if values is None else (text, repr(values[index])), index)
    left_out = LeftOut(
        blank=len(read) - len(worded),
        invalid=len(worded) - len(valid),
        short=len(valid) - len(longer),
        repeated=len(longer) - len(first),
    )
    texts = ["" if text is None else text for text in rows.texts]
    usable = UsableTexts(texts, left_out, config, are_chats, rows.kept).select(list(first.values()), left_out)
    check_count(usable, num_held_out)
    return usable


def check_count(usable: UsableTexts, num_held_out: int) -> None:
    """Check that something is left to train on.

    Raises:
        InputError: there are fewer than `num_held_out + 1` texts.
    """
    if not usable.texts:
        raise InputError(usable.describe_absence())
    if len(usable.texts) <= num_held_out:
        raise InputError(
            f"evaluation.num_prompts={num_held_out}: leaves no prompt for training: {usable.describe()}; "
            f"set it to {len(usable.texts) - 1} or less"
        )


def _check_conversations(config: PromptsConfig, texts: list[tuple[int, str]]) -> None:
    """Check that every text is a conversation that a response can be sampled for."""
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
    for index, text in texts:
        try:
            parse_messages(text)
        except ValueError as error:
            raise InputError(f"{COLUMN}={config.column}: row {index + 1} of {config.path} {error}") from error
