"""Scores do not depend on the texts beside them: padding, pad ids, limits of positions, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from ppo_ray.errors import InputError
from ppo_ray.reward.classifier import Classifier
from tests.conftest import make_tokenizer
from tests.reward.test_classifier import TEXTS, score_ids

LABELS = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA = BERT | {"num_key_value_heads": 2, "max_position_embeddings": 128}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}


def save(folder: Path, kind: str, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
    """Save a tiny random classifier, with changes to what its tokenizer says of itself (None: what it lacks)."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(vocab_size=512, initializer_range=0.5, **LABELS, **config)
    getattr(transformers, f"{kind}ForSequenceClassification")(made).save_pretrained(folder)
    make_tokenizer(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    for name, value in (tokenizer or {}).items():
        setattr(loaded, name, value)
    loaded.save_pretrained(folder)
    return folder


def ids_of(folder: Path, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def check_texts(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Classifier:
    """Compare the scores of texts in one batch with transformers' own score of each alone."""
    classifier = Classifier(str(folder), **options)
    alone = [score_ids(folder, ids_of(folder, text)) for text in texts]
    assert max(alone) - min(alone) > 0.1
    assert classifier.score(texts) == pytest.approx(alone, abs=1e-5)
    return classifier


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("Bert", BERT), ("GPT2", GPT2), ("Llama", LLAMA), ("XLNet", XLNET)],
    ids=lambda item: str(item)[:5],
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [0, 7, None])
def test_padding_side_and_pad_ids_change_nothing(
    tmp_path: Path, kind: str, sizes: dict[str, Any], side: str, pad_id: int | None
) -> None:
    """The tokenizer's pad id is 0; the config has the same one, another, or none."""
    check_texts(save(tmp_path, kind, {"padding_side": side}, pad_token_id=pad_id, **sizes))


@pytest.mark.parametrize(("kind", "sizes"), [("Llama", LLAMA), ("GPT2", GPT2)], ids=["Llama", "GPT2"])
@pytest.mark.parametrize("pad_id", [0, 7, None])
def test_texts_that_end_in_any_token_have_the_score_that_they_have_alone(
    tmp_path: Path, kind: str, sizes: dict[str, Any], pad_id: int | None
) -> None:
    """Of the tokenizer without pad and EOS token, and with texts that end in the ids that others are padded with."""
    folder = save(tmp_path, kind, {"pad_token": None, "eos_token": None}, pad_token_id=pad_id, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None
    words = [tokenizer.decode([token]) for token in range(1, 9)]
    ends = ["so good " + word for word in words if ids_of(folder, "so good " + word)[-1] in range(9)]
    assert len(ends) > 4
    check_texts(folder, [*TEXTS, "it ends so<eos>", "<eos>", *ends])


@pytest.mark.parametrize(("kind", "sizes"), [("Llama", LLAMA), ("GPT2", GPT2)], ids=["Llama", "GPT2"])
def test_a_pad_id_of_minus_one_is_none(tmp_path: Path, kind: str, sizes: dict[str, Any]) -> None:
    """The first Llama's config has it."""
    check_texts(save(tmp_path, kind, pad_token_id=-1, **sizes))


def test_a_classifier_of_padded_sentences_batches_them(tmp_path: Path) -> None:
    """Nothing is lost where padding does no harm: as few forward passes as there are batches."""
    classifier = check_texts(save(tmp_path, "Bert", **BERT))
    passes: list[int] = []
    classifier._model.register_forward_hook(lambda *_: passes.append(1))
    classifier.score(TEXTS)
    assert len(passes) == 1


def test_texts_of_a_model_that_mixes_all_tokens_are_batched_by_their_length(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 128}
    classifier = check_texts(save(tmp_path, "FNet", **sizes), [*TEXTS, "I liked it"])
    passes: list[int] = []
    classifier._model.register_forward_hook(lambda _, inputs, output: passes.append(len(output.logits)))
    classifier.score([*TEXTS, "I liked it"])
    assert sum(passes) == 6 and len(passes) < 6


@pytest.mark.parametrize("pad_id", [0, 1, 5])
def test_robertas_limit_is_the_one_of_its_table(tmp_path: Path, pad_id: int) -> None:
    """Positions begin behind the pad id: of 20 rows 19 are used, 18, or 14. Its config says 20."""
    folder = save(tmp_path, "Roberta", pad_token_id=pad_id, max_position_embeddings=20, **BERT)
    limit = {0: 19, 1: 18, 5: 14}[pad_id]
    classifier = Classifier(str(folder))
    assert classifier.max_tokens == limit
    exact = "".join("xq"[index % 2] for index in range(limit))  # a token each
    assert len(ids_of(folder, exact)) == limit
    found = classifier.score([exact, "good " + exact, "x"])
    assert found[0] == found[1] == pytest.approx(score_ids(folder, ids_of(folder, exact)), abs=1e-5)
    assert found[2] is not None and classifier.truncated == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("XLNet", XLNET),
        ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    ],
)
def test_a_model_without_a_limit_sees_the_whole_text(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    folder = save(tmp_path, kind, pad_token_id=3, eos_token_id=0, **config)
    long = "".join("xq"[index % 2] for index in range(700))
    texts = [text + "<eos>" for text in ("good " + long, "bad " + long, "so so")]
    classifier = check_texts(folder, texts)
    assert classifier.max_tokens is None and classifier.truncated == [False] * 3


def test_frequencies_that_go_by_the_longest_text_are_each_texts_own(tmp_path: Path) -> None:
    """Phi-3's long rope: beyond 16 tokens all positions of a pass have other frequencies."""
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    sizes = LLAMA | {"original_max_position_embeddings": 16, "rope_parameters": rope, "pad_token_id": 0}
    folder = save(tmp_path, "Phi3", bos_token_id=0, eos_token_id=0, **sizes)
    long = "The acting of this film was awful, and honestly " * 3
    assert len(ids_of(folder, long)) > 16 > len(ids_of(folder, TEXTS[0]))
    check_texts(folder, [*TEXTS, long])


def test_sparse_attention_is_not_switched_on_by_a_long_text(tmp_path: Path) -> None:
    """BigBird has full attention up to 7 blocks of 16 tokens; a longer text is cut to that."""
    sizes = BERT | {"block_size": 16, "num_random_blocks": 1, "max_position_embeddings": 512}
    classifier = Classifier(str(save(tmp_path, "BigBird", attention_type="block_sparse", **sizes)))
    assert classifier.max_tokens == 112
    first = classifier.score(TEXTS)
    classifier.score(["a wonderful story " * 100])
    assert classifier.truncated == [True]
    assert classifier.score(TEXTS) == first
    assert first == pytest.approx([score_ids(tmp_path, ids_of(tmp_path, text)) for text in TEXTS], abs=1e-5)


def test_special_tokens_stay_at_both_ends_of_a_cut_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = save(tmp_path, "Bert", max_position_embeddings=16, **BERT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    text = "".join("xq"[index % 2] for index in range(40)) + "z"
    ids = tokenizer(text)["input_ids"]
    kept = [0, *ids[-15:-1], 0]
    assert len(kept) == 16 and ids[-2] == tokenizer("z")["input_ids"][1]
    assert Classifier(str(folder)).score([text]) == pytest.approx([score_ids(folder, kept)], abs=1e-5)


def test_token_types_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Some tokenizers have a type of their own for special tokens, as XLNet's and Funnel's have."""
    from tokenizers.processors import TemplateProcessing

    folder = save(tmp_path, "Bert", **BERT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = TemplateProcessing(single="<eos>:1 $A:0", special_tokens=[("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        alone = [float(model(**item).logits[0, 1]) for item in inputs]
        untyped = [float(model(input_ids=item["input_ids"]).logits[0, 1]) for item in inputs]
    assert Classifier(str(folder)).score(TEXTS) == pytest.approx(alone, abs=1e-5) != pytest.approx(untyped, abs=1e-2)


def test_a_token_that_the_model_does_not_have_costs_its_text_alone(tmp_path: Path) -> None:
    """On a GPU it would end the process."""
    folder = save(tmp_path, "Bert", **BERT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{index}>" for index in range(300)])
    tokenizer.save_pretrained(folder)
    classifier = Classifier(str(folder))
    expected = classifier.score(TEXTS)
    found = classifier.score([TEXTS[0], "a <new299>", *TEXTS[1:]])
    assert found.pop(1) is None and found == pytest.approx(expected, abs=1e-5)
    assert classifier.failure is not None and "'a <new299>' has no score: its token 687" in classifier.failure
    assert "is none of the 512 that the model has" in classifier.failure


def test_a_tokenizer_whose_special_tokens_the_model_lacks_is_refused(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = save(tmp_path, "Bert", **BERT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{index}>" for index in range(300)])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 600)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="its token 600 is none of the 512 that the model has"):
        Classifier(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "its outputs are not finite: nan"),
        ("constant", "it gives every text the same outputs"),
        ("random", "it gives the same text another score each time"),
        ("three", r"for 5 texts has the shape \(5, 3\), not \(5, 2\), a number for each label"),
        ("one number", r"for 5 texts has the shape \(5,\)"),
        ("raises", "ValueError: where is the image"),
    ],
)
def test_a_model_that_cannot_score_a_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    def forward(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        total = input_ids.float().sum(1, keepdim=True)
        made = {
            "nan": total.log() * torch.nan,
            "constant": torch.ones_like(total),
            "random": total + 1e3 * torch.randn(total.shape),
            "three": total.repeat(1, 3),
            "one number": total[:, 0],
        }
        if change == "raises":
            raise ValueError("where is the image")
        logits = made[change].repeat(1, 2) if change in ("nan", "constant", "random") else made[change]
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)

    folder = save(tmp_path, "Bert", **BERT)
    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", forward)
    with pytest.raises(InputError, match=f"reward.path=.*: it cannot score a text: .*{message}"):
        Classifier(str(folder))


def test_a_model_that_looks_for_an_end_which_its_tokenizer_does_not_write_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    with pytest.raises(InputError, match="cannot score a text: ValueError: .* at least one <eos> token"):
        Classifier(str(save(tmp_path, "T5", pad_token_id=3, eos_token_id=0, **sizes)))
