import pytest

from benchmarks.flops import DecoderShape, forward_flops, update_flops
from ppo_ray.errors import InputError

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


def test_the_parameters_of_the_layers_are_counted():
    # q and o: 4 x 4 each; k and v: 4 x 2 each; gate, up and down: 4 x 6 each. 120 a layer.
    assert DecoderShape.of(CONFIG).parameters == 240


def test_the_demo_policy_has_106_million_parameters_in_its_layers():
    config = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    }
    # 134,515,008 in all, less 49,152 x 576 of the embedding and 61 norms of 576
    assert DecoderShape.of(config).parameters == 134_515_008 - 28_311_552 - 35_136


def test_a_pass_over_one_sequence_worked_by_hand():
    # 2 + 3 tokens, of which 4 matter: 2 x 240 x 4 = 1920; they see 1 + 2 + 3 + 4 = 10 tokens, 4 x 2 x 4 = 32 each:
    # 320; the head predicts 3 tokens: 2 x 4 x 10 x 3 = 240
    assert forward_flops(DecoderShape.of(CONFIG), [(2, 3)]) == 1920 + 320 + 240


def test_sequences_add_up_and_four_epochs_are_twelve_passes():
    shape = DecoderShape.of(CONFIG)
    once = forward_flops(shape, [(2, 3)]) + forward_flops(shape, [(1, 1)])
    assert forward_flops(shape, [(2, 3), (1, 1)]) == once
    assert update_flops(shape, [(2, 3), (1, 1)], epochs=4) == 12 * once


def test_another_architecture_is_refused():
    with pytest.raises(InputError, match="gpt2"):
        DecoderShape.of({"model_type": "gpt2"})
