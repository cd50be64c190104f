"""The prompt stream: the first tokens of a data set's texts, in an order that is a function of the run's seed.

Prompt number i is computed from (seed, i), not drawn from a running generator. So the stream's whole state is its
position, and a resumed run continues with the same prompts that it would have had without the interruption.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import QUOTED, InputError
from ppo_ray.prompts.texts import UsableTexts, read_usable_texts
from ppo_ray.seeding import derive_seed

_LOG = logging.getLogger(__name__)
_FINGERPRINTED = 16  # texts whose tokens tell one tokenizer from another
_FINGERPRINTED_CHARS = 10_000  # of each of these texts
_HELD_OUT_SEED = 0  # for every seed of a run: runs are compared on the same prompts


@dataclass(frozen=True)
class PromptBatch:
    """Prompts in the order of the stream."""

    sample_ids: tuple[int, ...]
    """Index in the stream; held-out prompts count down from -1, so that no seed derived from an id is shared."""
    prompt_ids: tuple[tuple[int, ...], ...]
    """`[P]` token ids of each prompt, at least one."""
    max_response_tokens: tuple[int, ...] | None = None
    """Limit of each response; None: drawn by the rollout worker, as the config says."""
    num_skipped: int = 0
    """Prompts left out because the tokenizer makes no ids of the text, or ids that the model does not know."""

    def split(self, n: int) -> "list[PromptBatch]":
        """Cut into at most n parts, in order, whose sizes differ by one at most; none is empty."""
        bounds = [len(self.sample_ids) * part // n for part in range(n + 1)]
        parts = [slice(start, stop) for start, stop in pairwise(bounds) if stop > start]
        limits = self.max_response_tokens
        return [
            PromptBatch(self.sample_ids[part], self.prompt_ids[part], None if limits is None else limits[part])
            for part in parts
        ]


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
    ) -> None:
        """Read the texts and hold some out.

        Args:
            config: which texts, and how long the prompts are.
            tokenizer: the policy's own, of transformers.
            seed: the run's; the order and the lengths follow from it, what is held out does not.
            num_held_out: texts that `take` never uses.
            vocab_size: of the policy: prompts with ids not in [0, vocab_size) are left out; None: not checked.
            texts: what `read_usable_texts` returned for these arguments; None: read them.

        Raises:
            InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left after the filter.
        """
        self._usable = texts or read_usable_texts(config, num_held_out)
        usable = self._usable.texts
        order = _permutation(len(usable), derive_seed(_HELD_OUT_SEED, "held_out"))
        self._config, self._tokenizer, self._seed, self._vocab_size = config, tokenizer, seed, vocab_size
        self._held_out = [usable[index] for index in order[:num_held_out]]
        self._texts = [usable[index] for index in np.sort(order[num_held_out:])]
        self._epoch, self._order = -1, np.arange(len(self._texts))
        self.position = 0
        self.fingerprint = self._fingerprint(usable)
        """Hash of the texts and of the tokenizer, whatever the seed: a resumed run must find the same."""

    @property
    def summary(self) -> str:
        """How many texts there are and how many were left out, as a run prints it when it starts."""
        return f"prompts: {self.describe()}"

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        return self._usable.describe()

    def take(self, n: int) -> PromptBatch:
        """Return the next n prompts and move on; the end of an epoch is the beginning of the next one.

        Prompts that cannot be used are left out and counted; the position moves by n all the same.

        Raises:
            InputError: none of the n can be used.
        """
        sample_ids = range(self.position, self.position + n)
        texts = [self._texts[self._index(sample_id)] for sample_id in sample_ids]
        batch = self._batch(sample_ids, texts, self._seed, "prompt_length")
        self.position += n
        return batch

    def peek(self, n: int) -> PromptBatch:
        """Return the next n prompts without moving on; see `take`."""
        position = self.position
        try:
            return self.take(n)
        finally:
            self.position = position

    def held_out(self) -> PromptBatch:
        """Return the held-out prompts: never seen in training, the same for every seed of a run.

        Those that cannot be used are left out, as `take` does.

        Raises:
            InputError: none can be used.
        """
        sample_ids = range(-1, -1 - len(self._held_out), -1)
        return self._batch(sample_ids, self._held_out, _HELD_OUT_SEED, "held_out_length")

    def _index(self, sample_id: int) -> int:
        epoch, offset = divmod(sample_id, len(self._texts))
        if self._config.shuffle and epoch != self._epoch:
            self._order = _permutation(len(self._texts), derive_seed(self._seed, "prompt_order", epoch))
            self._epoch = epoch
        return int(self._order[offset])

    def _batch(self, sample_ids: Sequence[int], texts: list[str], seed: int, purpose: str) -> PromptBatch:
        if not texts:
            return PromptBatch((), ())
        # The whole text is tokenised: cut before, its last token could be another one.
        tokens = self._tokenize(texts)
        num_lengths = self._config.max_tokens - self._config.min_tokens + 1
        kept: list[int] = []
        prompts: list[tuple[int, ...]] = []
        for sample_id, ids in zip(sample_ids, tokens, strict=True):
            length = self._config.min_tokens + derive_seed(seed, purpose, sample_id) % num_lengths
            prompt = tuple(int(token) for token in ids[:length])
            if prompt and self._knows(prompt):
                kept.append(sample_id)
                prompts.append(prompt)
        if not kept:
            raise InputError(self._describe_mismatch(texts, tokens[0]))
        return PromptBatch(tuple(kept), tuple(prompts), num_skipped=len(texts) - len(kept))

    def _tokenize(self, texts: list[str]) -> list[Sequence[int]]:
        """Return the ids of each text; no ids for a text that the tokenizer refuses, which spoils no other text.

        What the tokenizer puts in front is kept, what it puts behind is not: a prompt goes on.
        """
        try:
            # not verbose, for a whole text may well be longer than the model's context
            whole = self._tokenizer(texts, verbose=False)["input_ids"]
            bare = self._tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]
            return [_cut_behind(list(ids), list(own)) for ids, own in zip(whole, bare, strict=True)]
        except Exception:  # the tokenizers library raises no narrower kind
            if len(texts) > 1:
                return [self._tokenize([text])[0] for text in texts]
            _LOG.warning("the tokenizer refuses the text %r", texts[0][:QUOTED], exc_info=True)
            return [()]

    def _knows(self, prompt: tuple[int, ...]) -> bool:
        return self._vocab_size is None or all(0 <= token < self._vocab_size for token in prompt)

    def _describe_mismatch(self, texts: list[str], ids: Sequence[int]) -> str:
        """Return the message for texts of which none makes a prompt, with the ids of the first as an example."""
        known = "" if self._vocab_size is None else f", and the model knows 0 to {self._vocab_size - 1}"
        return (
            f"prompts.path={self._config.path}: none of {len(texts):,} texts makes a prompt: of "
            f"{texts[0][:QUOTED]!r} the tokenizer makes the ids {list(ids[: self._config.max_tokens])[:8]}{known}; "
            "tokenizer and model do not fit together: put the model's own tokenizer into model.path"
        )

    def _fingerprint(self, texts: list[str]) -> str:
        """Return XXH3-64 of the texts with their lengths, and of the ids of the first of them, hexadecimal."""
        state = xxhash.xxh3_64()
        for text in texts:
            raw = text.encode()
            state.update(f"{len(raw)}:".encode())
            state.update(raw)
        beginnings = [text[:_FINGERPRINTED_CHARS] for text in texts[:_FINGERPRINTED]]
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


def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)
