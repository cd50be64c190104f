from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_ray.errors import InputError
from ppo_ray.models.classifier import Classifier

TEXTS = [
    "I liked it",
    "The acting of this film was awful, and honestly",
    "so so",
    "what a wonderful story about people",
    "x",
]


def logits(folder: Path, text: str) -> list[float]:
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_scores_are_the_labels_raw_logits_in_order(tiny_classifier: Path, batch_size: int) -> None:
    positive = Classifier(str(tiny_classifier), "POSITIVE", batch_size=batch_size).score(TEXTS)
    negative = Classifier(str(tiny_classifier), "NEGATIVE", batch_size=batch_size).score(TEXTS)
    for text, *found in zip(TEXTS, negative, positive, strict=True):
        assert found == pytest.approx(logits(tiny_classifier, text), abs=1e-5)


def test_transforms(tiny_classifier: Path) -> None:
    wanted = torch.tensor(logits(tiny_classifier, TEXTS[0]))
    softmax = Classifier(str(tiny_classifier), transform="softmax").score(TEXTS[:1])
    sigmoid = Classifier(str(tiny_classifier), transform="sigmoid").score(TEXTS[:1])
    assert softmax == pytest.approx([float(wanted.softmax(0)[1])], abs=1e-6)
    assert sigmoid == pytest.approx([float(wanted.sigmoid()[1])], abs=1e-6)


def test_what_cannot_be_scored_is_none_and_costs_nobody_else(tiny_classifier: Path) -> None:
    classifier = Classifier(str(tiny_classifier))
    clean = classifier.score(TEXTS)
    mixed = classifier.score([TEXTS[0], None, TEXTS[1], "", *TEXTS[2:]])
    assert mixed[1] is mixed[3] is None
    assert [score for score in mixed if score is not None] == pytest.approx(clean, abs=1e-5)


def test_a_text_that_is_too_long_is_cut(tiny_classifier: Path) -> None:
    (score,) = Classifier(str(tiny_classifier)).score(["a wonderful film " * 500])
    assert score is not None


def test_a_label_it_lacks(tiny_classifier: Path) -> None:
    with pytest.raises(InputError, match="'HAPPY' is not a label of .*NEGATIVE.*POSITIVE"):
        Classifier(str(tiny_classifier), "HAPPY")
