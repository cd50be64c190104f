"""The reward classifier: one score per text, None for a text that cannot be scored."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import AutoModelForSequenceClassification

from ppo_ray.config import NO_TRUST, Trust
from ppo_ray.errors import InputError
from ppo_ray.models.loading import default_device, load_pretrained, load_tokenizer
from ppo_ray.reward.labels import find_label

Transform = Literal["logit", "softmax", "sigmoid"]

_log = logging.getLogger(__name__)


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
        """Load the model and its tokenizer.

        Args:
            path: folder or hub name.
            label: whose score is the reward, by its name in the model's `id2label`.
            transform: the raw logit, or its softmax or sigmoid.
            dtype: torch's name of what the model computes in, e.g. `"float32"` or `"bfloat16"`.
            device: None takes the GPU if there is one.
            batch_size: texts per forward pass.
            trust: what the model's folder may do.

        Raises:
            InputError: there is no such model or label, or the transform makes every score the same.
        """
        self._device = torch.device(device) if device is not None else default_device()
        self._model = load_pretrained(
            AutoModelForSequenceClassification, path, dtype=dtype, device=self._device, trust=trust
        )
        self._tokenizer = load_tokenizer(path, trust)
        self._label = find_label(self._model.config.id2label, label, path)
        self._transform = transform
        self._batch_size = batch_size
        if transform == "softmax" and self._model.config.num_labels == 1:
            raise InputError(
                f"reward.transform=softmax is always 1 for {path!r}: it has one label; use logit or sigmoid"
            )
        limits = (self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", None))
        self._max_tokens = min(limit for limit in limits if limit is not None)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id

    def score(self, texts: Sequence[str | None]) -> list[float | None]:
        """Score each text, in order: the label's logit, or its probability if the transform makes one.

        None stands for a text that is None or empty, that the tokenizer or model refuses, or whose score is not finite;
        it never changes the scores of the others. A text longer than the model takes is cut by the tokenizer.

        Raises:
            torch.OutOfMemoryError: a batch is too large for the device.
        """
        scores: list[float | None] = [None] * len(texts)
        encoded: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            if text:
                try:
                    encoded[index] = self._encode(text)
                except (TypeError, ValueError, UnicodeError) as error:
                    _log.warning("a text cannot be tokenised and gets no score: %s", error)
        order = sorted((index for index in encoded if encoded[index]), key=lambda index: len(encoded[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, score in zip(batch, self._score_or_split([encoded[index] for index in batch]), strict=True):
                scores[index] = score if score is not None and math.isfinite(score) else None
        return scores

    def _encode(self, text: str) -> list[int]:
        # max_length only where there is a limit: tokenizers without one say 1e30, which does not fit their own integer
        limit = {"truncation": True, "max_length": self._max_tokens} if self._max_tokens < 2**31 else {}
        return self._tokenizer(text, **limit)["input_ids"]

    def _score_or_split(self, encoded: list[list[int]]) -> list[float | None]:
        """Score a batch; if that raises, score each text by itself, so that only the bad one has no score."""
        try:
            return list(self._score_batch(encoded))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if len(encoded) == 1:
                _log.warning("a text of %d tokens cannot be scored: %s", len(encoded[0]), error)
                return [None]
            return [self._score_or_split([ids])[0] for ids in encoded]

    @torch.inference_mode()
    def _score_batch(self, encoded: list[list[int]]) -> list[float]:
        inputs = self._tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(self._device)
        logits = self._model(**inputs).logits.float()  # [B, labels]
        if self._transform == "softmax":
            logits = logits.softmax(-1)
        elif self._transform == "sigmoid":
            logits = logits.sigmoid()
        return logits[:, self._label].tolist()
