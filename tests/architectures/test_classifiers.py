"""Every sequence classifier of the installed transformers, tiny and random: scored as each text alone, or refused."""

import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ppo_ray.errors import InputError
from ppo_ray.reward.classifier import Classifier
from tests.architectures.tiny import chosen, make_model, save_tokenizer, tiny_config

ARCHITECTURES = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)

REFUSED = {"layoutlmv2": "requires the detectron2 library", "mra": "gives every text the same outputs"}
"""Those that are refused, and by which words."""


TEXTS = ["so", "what a slow film", "x", "I liked it, and the end", "awful", "funny people"]


def check_scores(folder: Path) -> str:
    """Compare the scores of texts in a batch, at the limit and beyond it with those of each alone."""
    classifier = Classifier(str(folder), label="LABEL_1", batch_size=4)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    limit = classifier.max_tokens
    letters = random.Random(2)
    long = ["".join(letters.choice("abcdefgh ") for _ in range(90)) for _ in range(3)]
    exact = [text[: (limit or 92) - 2] for text in long]
    texts = [*TEXTS, *exact, *long]
    scores = classifier.score(texts)

    def score_alone(text: str) -> float | None:
        kept = [*text.encode()][-((limit or 92) - 2) :]
        vocabulary = classifier._tokenizer.get_vocab()
        ids = [1, *(vocabulary["Ġ" if byte == 32 else chr(byte)] for byte in kept), 2]
        try:
            with torch.no_grad():
                return float(model(input_ids=torch.tensor([ids])).logits[0, 1])
        except RuntimeError:  # some models fail on texts of a few tokens
            return None

    alone = [score_alone(text) for text in texts]
    assert [score is None for score in scores] == [score is None for score in alone]
    known = [score for score in alone if score is not None]
    spread, size = max(known) - min(known), max(map(abs, known))
    assert len(known) > len(texts) / 2 and spread > 1e-3 * size, "the weights do not matter"
    worst = max(abs(found - right) for found, right in zip(scores, alone, strict=True) if found is not None)
    assert worst <= 1e-5 * (spread + size), worst / spread
    assert classifier.truncated == [limit is not None and len(text) > limit - 2 for text in texts]
    return f"works: {classifier._batching}, {limit or 'any number of'} tokens"


def judge(name: str, folder: Path) -> str:
    """Say how an architecture is scored, or why it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = tiny_config(name, num_labels=3, is_decoder=False)
            make_model(AutoModelForSequenceClassification, config).save_pretrained(folder)
        except ImportError as error:
            return f"not built: {str(error).strip().splitlines()[0]}"
        save_tokenizer(folder)
        try:
            return check_scores(folder)
        except InputError as error:
            return f"refused: {str(error).partition(': ')[2]}"


def rows() -> Iterator[tuple[str, str]]:
    """Yield every architecture with the verdict."""
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            yield name, judge(name, Path(folder))


@pytest.mark.parametrize("name", chosen(ARCHITECTURES))
def test_a_text_has_the_score_that_it_has_alone_or_the_model_is_refused(name: str, tmp_path: Path) -> None:
    verdict = judge(name, tmp_path)
    if name in REFUSED:
        assert REFUSED[name] in verdict
    else:
        assert verdict.startswith("works"), verdict


def test_what_is_listed_as_refused_exists() -> None:
    assert REFUSED.keys() <= set(ARCHITECTURES)
