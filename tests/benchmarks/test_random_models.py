"""The models of benchmarks: their operations by hand, and that the package takes them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.pytorch_utils import Conv1D

from benchmarks.flops import forward_flops, update_flops
from benchmarks.random_models import SHAPES, decoder_shape, write_model


def test_one_sequence_by_hand() -> None:
    # a layer: q 4x4, k and v 4x2, o 4x4 (2 heads 2 wide, 1 of keys and values), three of 4x6; the head: 4x10
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    # 4 tokens in 3 layers of 120 weights; 10 pairs attend, 2 products of 4 each, a layer; 2 tokens in the head of 40
    assert forward_flops(decoder_shape(config), [(3, 2)]) == 2880 + 480 + 160
    assert update_flops(decoder_shape(config), [(3, 2)], epochs=4) == 12 * 3520


def test_gpt2_has_85m_weights_in_its_layers_and_39m_in_its_head() -> None:
    # one token: 12 layers of 12 x 768^2 weights, attention to itself alone, 50257 x 768 in the head
    expected = 2 * 84_934_656 + 12 * 4 * 768 + 2 * 38_597_376
    assert forward_flops(decoder_shape(SHAPES["notebook"]()), [(1, 1)]) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_of_a_linear_map_is_counted(shape: str) -> None:
    config = SHAPES[shape]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    maps = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not head]
    assert decoder_shape(config).parameters == sum(module.weight.numel() for module in maps)
    assert decoder_shape(config).hidden * decoder_shape(config).vocab == head.weight.numel()


def test_a_model_is_written_with_a_tokenizer_of_all_its_ids(tmp_path: Path) -> None:
    write_model("tiny", tmp_path)
    first = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w511 w3 w0")["input_ids"] == [511, 3, 0]
    assert len(tokenizer) == 512 and tokenizer.eos_token_id == 0
    write_model("tiny", tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
