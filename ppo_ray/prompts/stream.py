"""The prompt stream: a data set's texts or conversations as token ids, in an order that follows from the run's seed.

Prompt number i is computed from (seed, i), not drawn from a running generator. So the stream's whole state is its
position, and a resumed run continues with the same prompts that it would have had without the interruption.
"""

import itertools
import json
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import QUOTED, InputError
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.prompts.chat import ChatTemplate, Message, has_template
from ppo_ray.prompts.order import HELD_OUT_SEED, Order
from ppo_ray.prompts.texts import CHUNK, UsableTexts, check_count, read_usable_texts
from ppo_ray.seeding import derive_seed

SHOW_S = 5.0  # between two lines that say how many prompts have been counted
_LOG = logging.getLogger(__name__)
_FINGERPRINTED = 16  # texts whose tokens tell one tokenizer from another
_FINGERPRINTED_CHARS = 10_000  # of each of these texts


class PromptStream:
    """Prompts without end; its whole state is `position`."""

    def __init__(
        self,
        config: PromptsConfig,
        tokenizer: Any,
        seed: int,
        num_held_out: int = 0,
        *,
        vocab_size: int | None = None,
        texts: UsableTexts | None = None,
        trains: bool = True,
        responses_per_prompt: int = 1,
        show: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Read the texts and hold some out.

        Args:
            config: which texts, and how long the prompts are.
            tokenizer: the policy's own, of transformers.
            seed: the run's; the order and the lengths follow from it, what is held out does not.
            num_held_out: texts that `take` never uses.
            vocab_size: of the policy: prompts with ids not in [0, vocab_size) are left out; None: not checked.
            texts: what `read_usable_texts` returned for these arguments; None: read them.
            trains: whether prompts will be taken; else all texts may be held out, and there may be fewer.
            responses_per_prompt: times that `take` returns each prompt.
            show: is called with a line about every five seconds while the tokens of all texts are counted.

        Raises:
            InputError: no data set, no such column, fewer than `num_held_out + 1` texts left after the filter, no chat
                template where one is needed, or one that refuses a conversation.
        """
        self._config, self._tokenizer, self._seed, self._vocab_size = config, tokenizer, seed, vocab_size
        self._times = responses_per_prompt
        usable = texts or read_usable_texts(config, num_held_out)
        self._template = ChatTemplate(config, tokenizer) if has_template(config, usable.are_chats) else None
        self._usable = usable
        self.fingerprint = self._fingerprint(usable)
        """Hash of the texts and of the tokenizer, whatever the seed: a resumed run must find the same."""
        if config.min_tokens is None and config.too_long in (None, "drop"):
            self._usable = self._drop_long(usable, show)
            check_count(self._usable, num_held_out if trains else 0)
        if not trains:
            num_held_out = min(num_held_out, len(self._usable))
        self._order = Order(
            self._usable.sources, config.quotas, seed=seed, num_held_out=num_held_out, shuffle=config.shuffle
        )
        self.position = 0

    @property
    def summary(self) -> str:
        """How many texts there are and how many were left out, as a run prints it when it starts."""
        return f"prompts: {self.describe()}"

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        return self._usable.describe()

    def take(self, n: int, may_be_none: bool = False) -> PromptBatch:
        """Return the prompts of the next n responses and move on; the end of an epoch is the beginning of the next one.

        Each prompt is there `responses_per_prompt` times in a row. Prompts that cannot be used are left out and
        counted; the position, which counts prompts, moves on by all of them.

        Args:
            n: a multiple of `responses_per_prompt`.
            may_be_none: whether it is no error if none of the prompts can be used.

        Raises:
            InputError: none of the prompts can be used.
        """
        batch = self.peek(n // self._times, may_be_none)
        self.position += n // self._times
        return batch if self._times == 1 else batch.repeat(self._times)

    def peek(self, num_prompts: int, may_be_none: bool = False) -> PromptBatch:
        """Return the next prompts, each once, without moving on; see `take`."""
        sample_ids = range(self.position, self.position + num_prompts)
        indices = [self._order.index(sample_id) for sample_id in sample_ids]
        return self._batch(sample_ids, indices, self._seed, "prompt_length", may_be_none)

    def held_out(self) -> PromptBatch:
        """Return the held-out prompts: never seen in training, the same for every seed of a run.

        Those that cannot be used are left out, as `take` does.

        Raises:
            InputError: none can be used.
        """
        indices = self._order.held_out.tolist()
        return self._batch(range(-1, -1 - len(indices), -1), indices, HELD_OUT_SEED, "held_out_length")

    def _batch(
        self, sample_ids: Sequence[int], indices: list[int], seed: int, purpose: str, may_be_none: bool = False
    ) -> PromptBatch:
        """Make the prompts of the texts at `indices`, each under its sample id."""
        if not indices:
            return PromptBatch((), ())
        texts = self._usable.read(np.array(indices))
        conversations = None if self._template is None else self._converse(texts)
        # The whole text is tokenised: cut before, its last token could be another one.
        tokens = self._tokenize(texts, conversations)
        kept: list[int] = []
        prompts: list[tuple[int, ...]] = []
        for place, (sample_id, ids) in enumerate(zip(sample_ids, tokens, strict=True)):
            prompt = tuple(int(token) for token in self._cut(ids, seed, purpose, sample_id))
            if prompt and self._knows(prompt):
                kept.append(place)
                prompts.append(prompt)
        if not kept and may_be_none:
            return PromptBatch((), (), num_skipped=len(texts))
        if not kept:
            raise InputError(self._describe_mismatch(len(texts), texts[0], tokens[0]))
        return PromptBatch(
            tuple(sample_ids[place] for place in kept),
            tuple(prompts),
            columns=self._columns(
                [indices[place] for place in kept], conversations and [conversations[place] for place in kept]
            ),
            num_skipped=len(texts) - len(kept),
        )

    def _cut(self, ids: Sequence[int], seed: int, purpose: str, sample_id: int) -> Sequence[int]:
        """Cut a prompt to its length: the drawn one, or the longest that there may be."""
        shortest, longest = self._config.min_tokens, self._config.max_tokens
        if shortest is not None:
            return ids[: shortest + derive_seed(seed, purpose, sample_id) % (longest - shortest + 1)]
        return ids[-longest:] if self._config.too_long == "keep_end" else ids[:longest]

    def _columns(self, indices: list[int], conversations: list[list[Message]] | None) -> pa.Table | None:
        """Return what goes with the prompts of the texts at `indices`; see `PromptBatch.columns`."""
        columns: dict[str, Any] = {}
        if conversations is not None:
            columns["messages"] = [json.dumps(messages, ensure_ascii=False) for messages in conversations]
        kept = self._usable.take(np.array(indices))
        if kept is not None:
            columns["row"] = kept.to_struct_array()
        return pa.table(columns) if columns else None

    def _converse(self, texts: Sequence[str]) -> list[list[Message]]:
        assert self._template is not None
        return [self._template.converse(text, self._usable.are_chats) for text in texts]

    def _drop_long(self, usable: UsableTexts, show: Callable[[str], None]) -> UsableTexts:
        """Leave out the texts that make a prompt which is too long, or none at all."""
        fitting = array("q")
        num_long, done, shown = 0, 0, time.monotonic()
        example: Sequence[int] = ()
        texts = iter(usable)
        for chunk in iter(lambda: list(itertools.islice(texts, CHUNK)), []):
            for place, ids in enumerate(self._tokenize(chunk), done):
                if len(ids) > self._config.max_tokens:
                    num_long += 1
                elif ids and self._knows(ids):
                    fitting.append(place)
                else:
                    example = ids
            done += len(chunk)
            if time.monotonic() - shown >= SHOW_S and done < len(usable):
                show(f"counting the tokens of {len(usable):,} prompts: {done / len(usable):.0%}")
                shown = time.monotonic()
        num_strange = len(usable) - num_long - len(fitting)
        if num_strange == len(usable):
            raise InputError(self._describe_mismatch(len(usable), usable.read(np.array([0]))[0], example))
        return usable.select(np.array(fitting, np.int64), replace(usable.left_out, long=num_long, strange=num_strange))

    def _tokenize(self, texts: list[str], conversations: list[list[Message]] | None = None) -> list[Sequence[int]]:
        """Return the ids of each text; no ids for a text that the tokenizer refuses, which spoils no other text.

        A conversation's are those of its template. Of a plain text what the tokenizer puts in front is kept, and what
        it puts behind is not: a prompt goes on.

        Args:
            texts: of the data set.
            conversations: that they stand for; None: they are read from the texts, where there is a template.
        """
        if self._template is not None:
            return list(self._template.tokenize(conversations or self._converse(texts)))
        try:
            # not verbose, for a whole text may well be longer than the model's context
            whole = self._tokenizer(texts, verbose=False)["input_ids"]
            if getattr(self._tokenizer, "is_fast", False) and not self._tokenizer.num_special_tokens_to_add():
                return [list(ids) for ids in whole]  # nothing is put in front or behind
            bare = self._tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]
            return [_cut_behind(list(ids), list(own)) for ids, own in zip(whole, bare, strict=True)]
        except Exception:  # the tokenizers library raises no narrower kind
            if len(texts) > 1:
                return [self._tokenize([text])[0] for text in texts]
            _LOG.warning("the tokenizer refuses the text %r", texts[0][:QUOTED], exc_info=True)
            return [()]

    def _knows(self, prompt: Sequence[int]) -> bool:
        return self._vocab_size is None or all(0 <= token < self._vocab_size for token in prompt)

    def _describe_mismatch(self, num_texts: int, first: str, ids: Sequence[int]) -> str:
        """Return the message for texts of which none makes a prompt, with the ids of one as an example."""
        known = "" if self._vocab_size is None else f", and the model knows 0 to {self._vocab_size - 1}"
        return (
            f"prompts.path={self._config.place}: none of {num_texts:,} texts makes a prompt: of "
            f"{first[:QUOTED]!r} the tokenizer makes the ids {list(ids[: self._config.max_tokens])[:8]}{known}; "
            "tokenizer and model do not fit together: put the model's own tokenizer into model.path"
        )

    def _fingerprint(self, usable: UsableTexts) -> str:
        """Return XXH3-64 of the texts with their lengths, kept columns, and the ids of the first texts, hexadecimal."""
        state = xxhash.xxh3_64()
        for text in usable:
            raw = text.encode()
            state.update(f"{len(raw)}:".encode())
            state.update(raw)
        if usable.config.sources:
            names = [source.name for source in usable.config.sources]
            state.update(json.dumps([names, usable.config.quotas, usable.sources.tolist()]).encode())
        rows = (json.dumps(row, default=str) for table in usable.take_all() for row in table.to_pylist())
        if usable.config.keep:
            state.update(b"[")
            for number, row in enumerate(rows):
                state.update(f"{', ' if number else ''}{row}".encode())
            state.update(b"]")
        beginnings = usable.read(np.arange(min(_FINGERPRINTED, len(usable))))
        if self._template is None:
            beginnings = [text[:_FINGERPRINTED_CHARS] for text in beginnings]
        ids = [[int(token) for token in row] for row in self._tokenize(beginnings)]
        state.update(json.dumps(ids).encode())
        return state.hexdigest()


def _cut_behind(whole: list[int], own: list[int]) -> list[int]:
    """Drop what a tokenizer puts behind a text, an end of sequence or a separator, as no text has ended yet.

    Special tokens that the text itself spells out are its own, and stay. Where it begins with what the tokenizer would
    put in front, that is there once.

    Args:
        whole: ids of the text as the tokenizer makes them.
        own: ids of the text alone.
    """
    if whole == own or not own:
        return own
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return own if own[:start] == whole[:start] else whole[: start + len(own)]
    return own  # nothing else is known to be the text's
