"""The reward classifier: one score per text, None for a text that cannot be scored.

A score is what the model gives for the text alone. Whether texts can be padded to one length without a change of their
scores is tried when the model is loaded; where they cannot, a batch holds texts of one length.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

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
        batch_tokens: int | None = None,
        chat_template: str = "none",
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
            batch_tokens: most tokens per forward pass, padding included; None: only `batch_size` counts.
            chat_template: as `reward.chat_template`; with one, `score` takes conversations.

        Raises:
            InputError: there is no such model, label or template, the transform makes no sense for it, or it cannot
                score a text: it needs more than a text, its scores are not finite, or one text gets two scores.
        """
        self._path, self._transform = path, transform
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._device = torch.device(device) if device is not None else default_device()
        self._model = load_pretrained(
            AutoModelForSequenceClassification, path, dtype=dtype, device=self._device, trust=trust
        )
        self._tokenizer = load_tokenizer(path, trust)
        self._tokenizer.truncation_side = "left"  # the response, at the end, stays
        self._template = None if chat_template == "none" else read_template(chat_template, self._tokenizer, path)
        self.arguments = () if self._template is None else ("messages",)
        """Names of what it reads beside prompts and responses."""
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

    def score(self, texts: Sequence[str | Sequence[Mapping[str, Any]] | None]) -> list[float | None]:
        """Score each text, in order: the label's logit, or its probability if the transform makes one.

        With a chat template a conversation stands in place of a text: messages, the last the response's.

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
        messages = [f"the text {_show(texts[index])!r} has no score: {failures[index]}" for index in shown]
        self.failure = messages[0] if messages else None
        for message in messages:
            _log.warning(message)
        if unsaid := len(failures) - len(shown):
            _log.warning("%d more texts of this batch have no score", unsaid)
        return scores

    def _encode(self, text: Any) -> tuple[Encoded, bool]:
        """Return a text's tokens, and whether its beginning had to be left out."""
        if not text:
            raise ValueError("it is empty")
        if not isinstance(text, str):
            return self._encode_chat(text)
        encoded = Encoded.of(self._tokenizer(text, verbose=False))
        too_long = self.max_tokens is not None and len(encoded.ids) > self.max_tokens
        return self._encode_end(text, self.max_tokens or 0) if too_long else self._check_ids(encoded), too_long

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Encoded, bool]:
        """Return the tokens that the template makes of a conversation; see `_encode`.

        Of one that is too long the end stays, behind the token that begins each sequence, if there is one.
        """
        try:
            made = Encoded.of(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._template,
                    tokenize=True,
                    return_dict=True,
                    truncation=False,
                )
            )
        except Exception as error:  # Jinja's errors, and whatever a template raises by itself
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from error
        limit = self.max_tokens
        if limit is None or len(made.ids) <= limit:
            return self._check_ids(made), False
        first = int(made.ids[0] == self._tokenizer.bos_token_id)
        ends = (items[:first] + items[len(items) - limit + first :] for items in (made.ids, made.types))
        return self._check_ids(Encoded(*ends)), True

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
            batch: list[int] = []
            for index in same:  # the longest comes last
                width = len(encoded[index].ids) * (len(batch) + 1)
                if len(batch) == size or (batch and self._batch_tokens is not None and width > self._batch_tokens):
                    yield batch
                    batch = []
                batch.append(index)
            yield batch

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


def read_template(chat_template: str, tokenizer: Any, path: str) -> str:
    """Return the chat template that `reward.chat_template` names: the classifier's tokenizer's own, or a file's.

    Raises:
        InputError: there is none.
    """
    if chat_template != "tokenizer":
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise InputError(f"reward.chat_template={chat_template}: cannot be read: {error}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"reward.chat_template=tokenizer: the tokenizer of {path} has no chat template; give a file with one"
        )
    return str(tokenizer.get_chat_template())


def _show(text: Any) -> str:
    """Quote the beginning of a text, or of a conversation's last message."""
    return str(text[-1].get("content") if text and not isinstance(text, str) else text or "")[:QUOTED]
