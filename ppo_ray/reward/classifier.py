"""The reward classifier: one score per text, None for a text that cannot be scored.

A score is what the model gives for the text alone. Whether texts can be padded to one length without a change of their
scores is tried when the model is loaded; where they cannot, a batch holds texts of one length.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

import torch
from transformers import AutoModelForSequenceClassification

from ppo_ray.config import NO_TRUST, Trust
from ppo_ray.errors import NUM_LOGGED, QUOTED, InputError, first_line
from ppo_ray.models.loading import default_device, load_pretrained, load_tokenizer
from ppo_ray.reward.batching import (
    PROBE_LENGTHS,
    Batching,
    Encoded,
    Inputs,
    find_batching,
    find_position_limit,
    make_probes,
)
from ppo_ray.reward.labels import check_transform, find_label, rope_types, token_limit

Transform = Literal["logit", "softmax", "sigmoid"]

_log = logging.getLogger(__name__)

_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a text's score in a batch and alone, as a share of the spread of scores."""


class Classifier:
    """Any `AutoModelForSequenceClassification` as a reward: the score of one label, chosen by name."""

    def __init__(
        self,
        path: str,
        label: str = "POSITIVE",
        transform: Transform = "logit",
        dtype: str = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 32,
        trust: Trust = NO_TRUST,
    ) -> None:
        """Load the model and its tokenizer, and find out how texts can be batched.

        Args:
            path: folder or hub name.
            label: whose score is the reward, by its name in the model's `id2label`.
            transform: the raw logit, or its softmax or sigmoid.
            dtype: torch's name of what the model computes in, e.g. `"float32"` or `"bfloat16"`.
            device: None takes the GPU if there is one.
            batch_size: texts per forward pass.
            trust: which revision, and what its files may do.

        Raises:
            InputError: there is no such model or label, the transform makes no sense for it, or it cannot score a text:
                it needs more than a text, its scores are not finite, or one text gets two scores.
        """
        self._path, self._transform, self._batch_size = path, transform, batch_size
        self._device = torch.device(device) if device is not None else default_device()
        self._model = load_pretrained(
            AutoModelForSequenceClassification, path, dtype=dtype, device=self._device, trust=trust
        )
        self._tokenizer = load_tokenizer(path, trust)
        self._tokenizer.truncation_side = "left"  # the response, at the end, stays
        config = self._model.config
        self._label = find_label(config.id2label, label, path)
        check_transform(transform, config, path)
        self.max_tokens = token_limit(config, self._tokenizer)
        """Tokens of the longest text that is scored whole, special tokens included; None: there is no limit."""
        self.truncated: list[bool] = []
        """Whether each text of the last `score` was too long, so that its beginning was left out."""
        self.failure: str | None = None
        """Why the first text without a score in the last `score` has none; None: every text has one."""
        self._inputs = Inputs(self._model, self._tokenizer)
        self._batching = self._try_model(_TOLERANCE.get(dtype, _TOLERANCE["bfloat16"]))

    def score(self, texts: Sequence[str | None]) -> list[float | None]:
        """Score each text, in order: the label's logit, or its probability if the transform makes one.

        None stands for a text that is None or empty, that the tokenizer or model refuses, or whose score is not finite;
        it never changes the scores of the others. Of a text longer than the model takes the beginning is left out, but
        for the special tokens that the tokenizer puts there.

        Raises:
            torch.OutOfMemoryError: a batch is too large for the device.
        """
        scores: list[float | None] = [None] * len(texts)
        self.truncated, self.failure = [False] * len(texts), None
        encoded: dict[int, Encoded] = {}
        failures: dict[int, str] = {}
        for index, text in enumerate(texts):
            try:
                encoded[index], self.truncated[index] = self._encode(text or "")
            except (TypeError, ValueError, UnicodeError, OverflowError) as error:
                failures[index] = first_line(error)
        for batch in self._batches(encoded):
            for index, result in zip(batch, self._score_or_split([encoded[i] for i in batch]), strict=True):
                if isinstance(result, str):
                    failures[index] = result
                elif not math.isfinite(result):
                    failures[index] = f"its score is {result}"
                else:
                    scores[index] = result
        shown = sorted(failures)[:NUM_LOGGED]
        messages = [f"the text {(texts[index] or '')[:QUOTED]!r} has no score: {failures[index]}" for index in shown]
        self.failure = messages[0] if messages else None
        for message in messages:
            _log.warning(message)
        if unsaid := len(failures) - len(shown):
            _log.warning("%d more texts of this batch have no score", unsaid)
        return scores

    def _encode(self, text: str) -> tuple[Encoded, bool]:
        """Return a text's tokens, and whether its beginning had to be left out."""
        if not text:
            raise ValueError("it is empty")
        encoded = Encoded.of(self._tokenizer(text, verbose=False))
        too_long = self.max_tokens is not None and len(encoded.ids) > self.max_tokens
        return self._encode_end(text, self.max_tokens or 0) if too_long else self._check_ids(encoded), too_long

    def _encode_end(self, text: str, length: int) -> Encoded:
        """Return the last tokens of a text, as many as wanted or as fit."""
        limit = length if self.max_tokens is None else min(length, self.max_tokens)
        return self._check_ids(Encoded.of(self._tokenizer(text, truncation=True, max_length=limit)))

    def _check_ids(self, encoded: Encoded) -> Encoded:
        """Check that a model has all tokens of a text: on a GPU one that it lacks would end the process."""
        limit = self._inputs.num_ids
        if not encoded.ids:
            raise ValueError("it has no token")
        if limit is not None and (worst := max(encoded.ids)) >= limit:
            raise ValueError(f"its token {worst} is none of the {limit} that the model has")
        return encoded

    def _batches(self, encoded: dict[int, Encoded]) -> Iterator[list[int]]:
        """Yield the indices of texts that are scored together."""
        order = sorted(encoded, key=lambda index: len(encoded[index].ids))
        size = 1 if self._batching == "alone" else self._batch_size
        pads = self._batching in ("right", "left")
        for _, same in groupby(order, key=lambda index: 0 if pads else len(encoded[index].ids)):
            group = list(same)
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def _score_or_split(self, encoded: list[Encoded]) -> list[float | str]:
        """Score a batch; if that raises, score each text by itself: the bad one has the reason in place of a score."""
        try:
            outputs = self._run(encoded, self._batching)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if len(encoded) == 1:
                return [f"the model fails on its {len(encoded[0].ids)} tokens: {first_line(error)}"]
            return [self._score_or_split([one])[0] for one in encoded]
        if self._transform == "softmax":
            outputs = outputs.softmax(-1)
        elif self._transform == "sigmoid":
            outputs = outputs.sigmoid()
        return list(outputs[:, self._label].tolist())

    @torch.inference_mode()
    def _run(self, encoded: list[Encoded], batching: Batching = "alone") -> torch.Tensor:
        """Return the model's own outputs, `[B, labels]` float32."""
        side = "left" if batching == "left" else "right"
        return self._model(**self._inputs.make(encoded, side)).logits.float()

    def _try_model(self, tolerance: float) -> Batching:
        """Find the model's real limit, and how texts can be batched.

        Raises:
            InputError: it cannot score a text.
        """
        refusal = f"reward.path={self._path}: it cannot score a text: "
        try:
            texts = make_probes(self._tokenizer, self._inputs.num_ids)
            positions = find_position_limit(
                self._model, lambda length: self._inputs.make([self._encode_end(texts[0], length)])
            )
            self.max_tokens = min((n for n in (self.max_tokens, positions) if n is not None), default=None)
            probes = [self._encode_end(text, length) for text, length in zip(texts, PROBE_LENGTHS, strict=True)]
            alone, again = (torch.cat([self._run([probe]) for probe in probes]) for _ in range(2))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: from a model that needs more than the tokens of a text
            raise InputError(f"{refusal}{type(error).__name__}: {first_line(error)}") from error
        if alone.shape != (len(probes), len(self._model.config.id2label)):
            raise InputError(
                f"{refusal}what it gives for {len(probes)} texts has the shape {tuple(alone.shape)}, not "
                f"{(len(probes), len(self._model.config.id2label))}, a number for each label"
            )
        if not alone.isfinite().all():
            raise InputError(f"{refusal}its outputs are not finite: {alone[~alone.isfinite()][0]}")
        if len(alone) > 1 and bool((alone == alone[0]).all()):
            raise InputError(f"{refusal}it gives every text the same outputs: {alone[0].tolist()[:3]}")
        spread, size = float(alone.amax(0).sub(alone.amin(0)).max()), float(alone.abs().max())
        largest = tolerance * (spread + size / 10)
        if not bool(((again - alone).abs() <= largest).all()):
            raise InputError(f"{refusal}it gives the same text another score each time")
        return find_batching(
            lambda chosen, batching: self._run([probes[index] for index in chosen], batching),
            alone,
            [len(probe.ids) for probe in probes],
            largest,
            may_pad="longrope" not in rope_types(self._model.config),  # its frequencies go by a batch's longest text
        )
