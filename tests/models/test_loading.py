from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_ray.errors import InputError
from ppo_ray.models.loading import load_causal_lm, load_tokenizer


def test_dropout_is_off_and_attention_is_sdpa(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), dtype="bfloat16", device="cpu")
    assert model.config.resid_pdrop == 0.1  # dropout there is, but not in eval mode
    assert not any(module.training for module in model.modules())
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot load the model '.*nowhere'.*Give a folder"):
        load_causal_lm(missing)
    with pytest.raises(InputError, match=r"cannot load a tokenizer from '.*nowhere'"):
        load_tokenizer(missing)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_causal_lm(str(tmp_path))


def test_a_folder_without_weights_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="cannot load the model"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match="cannot load the model"):
        load_causal_lm(str(tmp_path))
