from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.assets.toy import build_toy, build_words, score_vowels


def test_scores_by_hand() -> None:
    assert score_vowels(["aeiou", "bcd", "a b ", "", "ooze"]) == [1.0, 0.0, 0.25, None, 0.75]


def test_every_letter_of_the_texts_is_a_token_and_comes_back(tmp_path: Path) -> None:
    build_words(tmp_path / "words.parquet")
    build_toy(tmp_path / "toy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "toy")
    texts = pq.read_table(tmp_path / "words.parquet")["text"].to_pylist()
    assert len(set(texts)) == 64
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer("The 1!")["input_ids"]) == "the 1"
    chat = [{"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "user: Why?\nassistant: "
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy")
    assert model.config.vocab_size == len(tokenizer) == 42
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(0.3e6, rel=0.1)
