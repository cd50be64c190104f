"""The texts of tokens: by `tokenizer.json`, by a tokenizer that has none, and never by a stranger's code."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer

from ppo_ray.view.sample import TokenTexts

TEXT = "Så 👍 é"


def save_fast(folder: Path) -> list[int]:
    """Write a tokenizer of bytes; returns the ids of `TEXT`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return list(tokenizer.encode(TEXT).ids)


def save_slow(folder: Path) -> list[int]:
    """Write a tokenizer that has no `tokenizer.json`; returns the ids of `TEXT`."""
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.json").exists()
    return list(tokenizer.encode(TEXT, add_special_tokens=False))


@pytest.mark.parametrize("save", [save_fast, save_slow])
@pytest.mark.parametrize("place", ["checkpoints/step-00003", "model"])
def test_each_token_adds_its_text(save, place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True)
    ids = save(tmp_path / place)
    texts = TokenTexts(tmp_path, str(tmp_path / "model")).decode(ids)
    assert texts is not None and len(texts) == len(ids) == len(TEXT.encode())
    assert [text for text in texts if text] == list(TEXT) and "".join(texts) == TEXT
    assert texts[1:3] == ["", "å"]  # a character of two bytes


def test_a_tokenizer_with_code_of_its_own_is_not_loaded(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    ids = save_slow(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokens.Own", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "tokens.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert TokenTexts(tmp_path, str(model)).decode(ids) is None
    assert not (tmp_path / "ran").exists()


def test_without_a_tokenizer_there_are_no_texts(tmp_path: Path) -> None:
    assert TokenTexts(tmp_path, None).decode([1]) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert TokenTexts(tmp_path, str(tmp_path)).decode([1]) is None
