import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ppo_ray.config import Trust
from ppo_ray.errors import InputError
from ppo_ray.reward.classifier import Classifier
from tests.conftest import make_tokenizer

PICKLE = "pytorch_model.bin"
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


def score_ids(folder: Path, ids: list[int], label: int = 1) -> float:
    """Return transformers' own score of these tokens alone."""
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return float(model(input_ids=torch.tensor([ids])).logits[0, label])


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


def test_many_texts_without_a_score_do_not_fill_the_log(
    tiny_classifier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = Classifier(str(tiny_classifier))
    caplog.clear()
    assert classifier.score([None] * 500) == [None] * 500
    assert len(caplog.records) == 4 and "497 more texts of this batch" in caplog.records[-1].getMessage()


def test_a_text_that_is_too_long_is_cut(tiny_classifier: Path) -> None:
    (score,) = Classifier(str(tiny_classifier)).score(["a wonderful film " * 500])
    assert score is not None


def test_a_label_it_lacks(tiny_classifier: Path) -> None:
    with pytest.raises(InputError, match="label=HAPPY: .* has no such label; it has NEGATIVE, POSITIVE"):
        Classifier(str(tiny_classifier), "HAPPY")


def test_a_text_the_tokenizer_refuses_is_none_alone(tiny_classifier: Path) -> None:
    classifier = Classifier(str(tiny_classifier))
    lone_surrogate = "a \ud800 film"
    found = classifier.score([TEXTS[0], lone_surrogate, *TEXTS[1:]])
    assert found.pop(1) is None
    assert found == pytest.approx(classifier.score(TEXTS), abs=1e-5)


@pytest.mark.parametrize("failure", ["raises", "not finite"])
def test_a_text_the_model_fails_on_is_none_alone(tiny_classifier: Path, failure: str) -> None:
    classifier = Classifier(str(tiny_classifier))
    expected = classifier.score(TEXTS)
    (culprit,) = AutoTokenizer.from_pretrained(tiny_classifier)(TEXTS[4])["input_ids"]
    embedding = classifier._model.get_input_embeddings()
    if failure == "raises":
        embedding.register_forward_pre_hook(refuse_token(culprit))
    else:
        embedding.weight.data[culprit] = float("nan")
    found = classifier.score(TEXTS)
    assert found.pop(4) is None
    assert found == pytest.approx(expected[:4], abs=1e-5)


def refuse_token(token: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == token).any():
            raise RuntimeError("no such token")

    return hook


def test_the_end_of_a_long_text_stays_and_its_beginning_goes(tiny_classifier: Path) -> None:
    classifier = Classifier(str(tiny_classifier))
    long = "a wonderful story " * 200
    kept = AutoTokenizer.from_pretrained(tiny_classifier)(long + "slow")["input_ids"][-128:]
    found = classifier.score([long + "slow", "what came before " + long + "slow", long + "funny", "slow"])
    wanted = pytest.approx(score_ids(tiny_classifier, kept), abs=1e-5)  # rows of one batch may round differently
    assert found[0] == wanted and found[1] == wanted
    assert abs(found[2] - found[0]) > 1e-3
    assert classifier.max_tokens == 128 and classifier.truncated == [True, True, True, False]


def test_a_nameless_only_label_is_the_one_meant(tiny_classifier: Path, tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig.from_pretrained(tiny_classifier, num_labels=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_classifier).save_pretrained(tmp_path)
    assert Classifier(str(tmp_path)).score(TEXTS[:1]) == pytest.approx(logits(tmp_path, TEXTS[0]), abs=1e-5)
    with pytest.raises(InputError, match=r"reward\.transform=softmax is always 1"):
        Classifier(str(tmp_path), transform="softmax")


def test_pickled_weights_are_loaded_only_where_they_are_allowed(tiny_classifier: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_classifier, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save(AutoModelForSequenceClassification.from_pretrained(tiny_classifier).state_dict(), folder / PICKLE)
    with pytest.raises(InputError, match="allow_pickled_weights"):
        Classifier(str(folder))
    expected = Classifier(str(tiny_classifier)).score(TEXTS)
    assert Classifier(str(folder), trust=Trust(pickles=True)).score(TEXTS) == expected


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
    "{% if messages[-1].content == 'never' %}{{ raise_exception('not this') }}{% endif %}"
)
CHATS = [[{"role": "user", "content": "Was it good?"}, {"role": "assistant", "content": answer}] for answer in TEXTS]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder as a classifier; its tokenizer, unlike a policy's, knows special tokens that its template writes."""
    folder = tmp_path_factory.mktemp("decoder")
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<bos>"]})
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=512, intermediate_size=64, max_position_embeddings=64, num_labels=1, initializer_range=0.5, **sizes
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def chat_ids(folder: Path, chat: list[dict[str, str]], template: str | None = None) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(
        tokenizer.apply_chat_template(chat, chat_template=template, tokenize=True, return_dict=True)["input_ids"]
    )


@pytest.mark.parametrize("batching", [{"batch_size": 1}, {"batch_size": 3}, {}, {"batch_tokens": 40}])
def test_conversations_are_scored_by_the_models_own_template(decoder: Path, batching: dict[str, int]) -> None:
    wanted = [score_ids(decoder, chat_ids(decoder, chat), label=0) for chat in CHATS]
    found = Classifier(str(decoder), chat_template="tokenizer", **batching).score(CHATS)
    assert found == pytest.approx(wanted, abs=1e-5) and max(wanted) - min(wanted) > 0.1
    special = AutoTokenizer.from_pretrained(decoder).convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert all(chat_ids(decoder, chat).count(token) == 1 for chat in CHATS for token in special)


def test_a_template_of_ones_own_and_what_it_refuses(decoder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}")
    classifier = Classifier(str(decoder), chat_template=str(own))
    long = [{"role": "user", "content": "so good " * 60}, {"role": "assistant", "content": "a story"}]
    ids = chat_ids(decoder, long, own.read_text())
    wanted = [
        score_ids(decoder, chat_ids(decoder, CHATS[0], own.read_text()), 0),
        score_ids(decoder, [ids[0], *ids[-63:]], 0),
    ]
    assert classifier.score([CHATS[0], long]) == pytest.approx(wanted, abs=1e-5)
    assert classifier.truncated == [False, True]
    refusing = Classifier(str(decoder), chat_template="tokenizer")
    assert refusing.score([[*CHATS[0][:1], {"role": "assistant", "content": "never"}], CHATS[1]])[0] is None
    assert refusing.failure == "the text 'never' has no score: the chat template refuses it: not this"
    with pytest.raises(InputError, match=r"reward.chat_template=/no.jinja: cannot be read"):
        Classifier(str(decoder), chat_template="/no.jinja")


def test_a_classifier_without_a_template_says_so(tiny_classifier: Path) -> None:
    with pytest.raises(InputError, match="the tokenizer of .* has no chat template; give a file with one"):
        Classifier(str(tiny_classifier), chat_template="tokenizer")


def test_no_forward_pass_has_more_tokens_than_it_may(tiny_classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(str(tiny_classifier), batch_tokens=30, batch_size=3)
    texts = ["x " * n for n in (1, 1, 1, 1, 2, 5, 9, 30, 3)]
    passes: list[tuple[int, int]] = []
    run = classifier._run

    def note(encoded: list[Any], batching: Any) -> torch.Tensor:
        passes.append((len(encoded), max(len(one.ids) for one in encoded)))
        return run(encoded, batching)

    monkeypatch.setattr(classifier, "_run", note)
    assert classifier.score(texts) == pytest.approx(
        [Classifier(str(tiny_classifier)).score([one])[0] for one in texts], abs=1e-5
    )
    assert sum(rows for rows, _ in passes) == len(texts)
    assert all(rows <= 3 and (rows == 1 or rows * width <= 30) for rows, width in passes)
    assert any(rows == 3 for rows, _ in passes) and any(rows == 1 and width > 30 for rows, width in passes)


def test_bfloat16_halves_the_weights(decoder: Path) -> None:
    sizes = [
        sum(weight.nbytes for weight in Classifier(str(decoder), dtype=dtype)._model.parameters())
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[0] == 2 * sizes[1]
