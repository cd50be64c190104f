"""The count of operations that benchmarks divide by, against figures worked out by hand."""

import pytest
from transformers import GPT2Config, LlamaConfig

from benchmarks.model_flops import forward_flops, update_flops

# a layer: q 4x4, k and v 4x2, o 4x4 (2 heads 2 wide, 1 of keys and values), three of 4x6; the head: 4x10
TINY = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


def test_one_sequence_by_hand() -> None:
    # 4 tokens in 3 layers of 120 weights; 10 pairs attend, 2 products of 4 each, a layer; 2 tokens in the head of 40
    assert forward_flops(TINY, [3], [2]) == 2 * 3 * 120 * 4 + 3 * 10 * 2 * 2 * 4 + 2 * 40 * 2
    assert forward_flops(TINY, [3], [2]) == 2880 + 480 + 160


def test_a_tied_head_counts_and_an_embedding_does_not() -> None:
    untied = LlamaConfig(**(TINY.to_diff_dict() | {"tie_word_embeddings": False}))
    assert forward_flops(untied, [3], [2]) == forward_flops(TINY, [3], [2])


def test_sequences_add_up_and_an_update_is_five_forwards_and_three_more_an_epoch() -> None:
    one, other = forward_flops(TINY, [3], [2]), forward_flops(TINY, [1], [7])
    assert forward_flops(TINY, [3, 1], [2, 7]) == one + other
    assert update_flops(TINY, [3], [2], epochs=1) == 5 * one
    assert update_flops(TINY, [3], [2], epochs=4) == 14 * one


def test_gpt2_has_85m_weights_in_its_layers_and_39m_in_its_head() -> None:
    # one token: 12 layers of 12 x 768^2 weights, attention to itself alone, 50257 x 768 in the head
    expected = 2 * 84_934_656 + 12 * 4 * 768 + 2 * 38_597_376
    assert forward_flops(GPT2Config(), [1], [1]) == expected


def test_a_prompt_for_each_response() -> None:
    with pytest.raises(ValueError):
        forward_flops(TINY, [3, 1], [2])
