"""The forward pass over packed rows against plain transformers, one sequence at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ppo_ray.errors import InputError
from ppo_ray.models.packing import microbatches, pack
from ppo_ray.models.response_lm import ResponseLM
from ppo_ray.models.value_head import CausalLMWithValueHead

SIZES = [(2, 5), (7, 1), (1, 9), (3, 3), (4, 6), (6, 2)]


def llama() -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, tie_word_embeddings=True))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    )


@pytest.fixture(params=[llama, gpt2])
def causal_lm(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().double().eval()


@pytest.fixture
def sequences() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(0, 50, size[k]).astype(np.int32) for size in SIZES] for k in range(2))
    return prompts, responses


@pytest.mark.parametrize("row_width", [0, 8, 16, 64])
def test_packed_rows_give_what_each_sequence_gives_alone(causal_lm: Any, sequences: Any, row_width: int) -> None:
    prompts, responses = sequences
    policy = CausalLMWithValueHead(causal_lm, temperature=0.7)
    policy.value_head.double()
    assert policy.packs
    seen = []
    for rows in microbatches([sum(size) - 1 for size in SIZES], budget=40, row_width=row_width):
        packed = pack(rows, prompts, responses)
        output = policy(packed)
        for place, index in enumerate(packed.sequences):
            prompt, response = prompts[index], torch.from_numpy(responses[index]).long()
            ids = torch.tensor(np.concatenate([prompt, responses[index]]), dtype=torch.int64)[None]
            result = causal_lm(ids, output_hidden_states=True)
            at = slice(len(prompt) - 1, -1)  # the token before each response token
            distribution = torch.distributions.Categorical(logits=result.logits[0, at] / 0.7)
            values = policy.value_head(result.hidden_states[-1][0, at])[:, 0]
            size = len(response)
            torch.testing.assert_close(output.logprobs[place, :size], distribution.log_prob(response))
            torch.testing.assert_close(output.entropies[place, :size], distribution.entropy())
            torch.testing.assert_close(output.values[place, :size], values)
            assert not output.logprobs[place, size:].any()
            seen.append(int(index))
    assert sorted(seen) == list(range(len(SIZES)))


def test_a_token_that_is_the_pad_token_is_a_token(causal_lm: Any) -> None:
    """Masks come from lengths: a sequence full of id 0, which fills the padding too, is not cut."""
    policy = ResponseLM(causal_lm)
    zeros = [np.zeros(size, np.int32) for size in (2, 4)]
    padded = policy(pack([[0], [1]], zeros, [zeros[0], np.zeros(7, np.int32)]))
    alone = policy(pack([[0]], zeros[:1], zeros[:1]))
    torch.testing.assert_close(padded.logprobs[0, :2], alone.logprobs[0])


def test_models_that_change_their_logits_are_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5)
    torch.manual_seed(0)
    with pytest.raises(InputError, match="final_logit_softcapping"):
        ResponseLM(Gemma2ForCausalLM(config).eval())


def test_the_value_head_follows_from_its_seed() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    state = torch.get_rng_state()
    first, same, other = (CausalLMWithValueHead(model, value_head_seed=seed).value_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
