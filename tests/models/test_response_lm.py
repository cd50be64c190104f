"""The forward pass over packed rows against plain transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ppo_ray.errors import InputError
from ppo_ray.models.actor_critic import CausalLMWithValueHead
from ppo_ray.models.packing import make_microbatches, pack
from ppo_ray.models.response_lm import ResponseLM

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
    assert policy.traits.packs
    seen = []
    for rows in make_microbatches([sum(size) - 1 for size in SIZES], budget=40, row_width=row_width):
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


def test_shared_tokens_give_the_figures_and_gradients_of_sequences_alone(causal_lm: Any, sequences: Any) -> None:
    prompts, responses = sequences
    prompts = [np.concatenate([prompts[1][: 3 + index % 4], prompt]) for index, prompt in enumerate(prompts)]
    policy = CausalLMWithValueHead(causal_lm, temperature=0.7)
    policy.value_head.double()
    assert policy.traits.packs
    found = []
    for shortest in (0, 1):
        rows = pack([[3, 4, 0, 1], [5, 2]], prompts, responses, shortest_shared=shortest)
        output = policy(rows)
        draw = torch.Generator().manual_seed(0)
        figures = [output.logprobs, output.entropies, output.values]
        loss = sum((torch.randn(part.shape, generator=draw, dtype=part.dtype) * part).sum() for part in figures)
        found.append((rows.input_ids.shape[1], figures, torch.autograd.grad(loss, list(policy.parameters()))))
    (whole, wanted, gradients), (shared, got, others) = found
    assert shared < whole
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
    exact = 1e-10 if isinstance(causal_lm, GPT2LMHeadModel) else 1e-5  # Llama's norms compute in float32
    torch.testing.assert_close(others, gradients, atol=exact, rtol=0)


def test_a_token_that_is_the_pad_token_is_a_token(causal_lm: Any) -> None:
    """Masks come from lengths: a sequence full of id 0, which fills the padding too, is not cut."""
    policy = ResponseLM(causal_lm, temperature=1.0)
    zeros = [np.zeros(size, np.int32) for size in (2, 4)]
    padded = policy(pack([[0], [1]], zeros, [zeros[0], np.zeros(7, np.int32)]))
    alone = policy(pack([[0]], zeros[:1], zeros[:1]))
    torch.testing.assert_close(padded.logprobs[0, :2], alone.logprobs[0])


def test_a_forward_pass_reads_nothing_back_from_the_device(causal_lm: Any, sequences: Any) -> None:
    """On a GPU each number that the host reads would wait for all work that is queued."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(options or {}))

    policy = CausalLMWithValueHead(causal_lm, temperature=0.7)
    rows = pack([[0, 1], [2]], *sequences)
    with NoReading():
        policy(rows)
        with pytest.raises(AssertionError):
            int(rows.seen_until.max())


def test_models_that_change_their_logits_are_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5)
    torch.manual_seed(0)
    with pytest.raises(InputError, match="final_logit_softcapping"):
        ResponseLM(Gemma2ForCausalLM(config).eval(), temperature=1.0)
