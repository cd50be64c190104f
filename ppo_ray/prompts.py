"""The prompt stream: the first tokens of a data set's texts, in an order that is a function of the run's seed.

Nothing is drawn from a running generator: prompt number i is computed from (seed, i), so the stream's whole state is
its position, and a resumed run continues with the very prompts that the first one would have had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError
from ppo_ray.prompt_source import read_texts
from ppo_ray.seeding import derive_seed

_HELD_OUT_SEED = 0  # whatever the run's seed: runs are compared on the same prompts


@dataclass(frozen=True)
class PromptBatch:
    """Prompts in the order of the stream."""

    sample_ids: tuple[int, ...]
    """Index in the stream; held-out prompts count down from -1, so that no seed derived from an id is shared."""
    prompt_ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt, at least one."""
    max_response_tokens: tuple[int, ...] | None = None
    """Limit of each response; None: drawn by the rollout worker, as the config says."""

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

    def __init__(self, config: PromptsConfig, tokenizer: Any, seed: int, num_held_out: int = 0) -> None:
        """Read the texts and hold some out.

        Args:
            config: which texts, and how long the prompts are.
            tokenizer: the policy's own, of transformers.
            seed: the run's; the order and the lengths follow from it, what is held out does not.
            num_held_out: texts that `take` never uses.

        Raises:
            InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left after the filter.
        """
        texts = usable_texts(config, num_held_out)
        order = _permutation(len(texts), derive_seed(_HELD_OUT_SEED, "held_out"))
        held_out = order[:num_held_out]
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._held_out = [texts[index] for index in held_out]
        self._texts = [texts[index] for index in np.sort(order[num_held_out:])]
        self._epoch, self._order = -1, np.arange(len(self._texts))
        self.position = 0

    def take(self, n: int) -> PromptBatch:
        """Return the next n prompts and move on; the end of an epoch is the beginning of the next one."""
        sample_ids = range(self.position, self.position + n)
        texts = [self._texts[self._index(sample_id)] for sample_id in sample_ids]
        batch = self._batch(sample_ids, texts, self._seed, "prompt_length")
        self.position += n
        return batch

    def held_out(self) -> PromptBatch:
        """Return the held-out prompts: never seen in training, the same for every seed of a run."""
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
        # Not verbose, for a whole text may well be longer than the model's context.
        tokens = self._tokenizer(texts, verbose=False)["input_ids"]
        num_lengths = self._config.max_tokens - self._config.min_tokens + 1
        prompts = []
        for sample_id, text, ids in zip(sample_ids, texts, tokens, strict=True):
            if not ids:
                raise InputError(f"prompts.path={self._config.path}: the tokenizer makes no token of {text[:60]!r}")
            length = self._config.min_tokens + derive_seed(seed, purpose, sample_id) % num_lengths
            prompts.append(tuple(int(token) for token in ids[:length]))
        return PromptBatch(tuple(sample_ids), tuple(prompts))


def usable_texts(config: PromptsConfig, num_held_out: int) -> list[str]:
    """Read the texts longer than `min_chars`, each once, blank ones left out, in the order of the data set.

    Raises:
        InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left.
    """
    texts = read_texts(config)
    longer = (text for text in texts if text and len(text) > config.min_chars and text.strip())
    usable = list(dict.fromkeys(longer))
    limit = f"prompts.min_chars={config.min_chars}"
    counts = f"of {len(texts)} texts in {config.path} {len(usable)} different ones are longer than {limit}"
    if not usable:
        raise InputError(f"{limit}: no prompt left: {counts}; lower it")
    if len(usable) <= num_held_out:
        raise InputError(
            f"evaluation.num_prompts={num_held_out}: leaves no prompt for training: {counts}; "
            f"set it to {len(usable) - 1} or less"
        )
    return usable


def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)
