"""Policies with a value head or a critic over several families, held against the plain transformers model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from ppo_ray.errors import InputError
from ppo_ray.models.actor_critic import VALUE_HEAD_FILE, CausalLMWithCritic, CausalLMWithValueHead
from ppo_ray.models.loading import cast
from ppo_ray.models.packing import make_microbatches, pack
from ppo_ray.models.response_lm import ResponseLM
from tests.learning import save_policy

SIZES = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, **BLOCK, "num_key_value_heads": 2, "initializer_range": 0.3}


def make(family: str, **changes: Any) -> Any:
    configs = {
        "llama": lambda: transformers.LlamaConfig(**GROUPED, **changes),
        "qwen2": lambda: transformers.Qwen2Config(**GROUPED, **changes),
        "gpt2": lambda: transformers.GPT2Config(
            **SIZES, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **changes
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, **BLOCK, initializer_range=0.3, **changes),
        "opt": lambda: transformers.OPTConfig(
            **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, init_std=0.3, **changes
        ),
        "bloom": lambda: transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
        "cohere": lambda: transformers.CohereConfig(**GROUPED, logit_scale=0.1),
    }
    torch.manual_seed(0)
    config = configs[family]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


generator = np.random.default_rng(0)
LENGTHS = [(2, 5), (8, 1), (3, 3), (1, 12), (4, 7)]
PROMPTS = [generator.integers(0, 50, p) for p, _ in LENGTHS]  # 0, the pad token, occurs
RESPONSES = [generator.integers(0, 50, r) for _, r in LENGTHS]
NUM_TOKENS = [p + r for p, r in LENGTHS]


@pytest.mark.parametrize(
    ("family", "packs"),
    [
        ("llama", True),
        ("qwen2", True),
        ("gpt2", True),
        ("gpt_neox", True),
        ("opt", True),
        ("bloom", False),
        ("mistral", False),
    ],
)
def test_a_batch_has_the_figures_of_each_sequence_alone(family: str, packs: bool) -> None:
    causal_lm = make(family)
    model = CausalLMWithValueHead(causal_lm, temperature=0.8)
    assert model.traits.packs == packs
    (rows,) = make_microbatches(NUM_TOKENS, 10**6, 20 if packs else 0)
    with torch.no_grad():
        output = model(pack(rows, PROMPTS, RESPONSES))
        for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            input_ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
            plain = causal_lm(input_ids, output_hidden_states=True)
            before = slice(len(prompt) - 1, -1)
            wanted = torch.distributions.Categorical(logits=plain.logits[0, before] / 0.8)
            values = model.value_head(plain.hidden_states[-1][0, before])[:, 0]  # no temperature in values
            found = slice(len(response))
            close = {"atol": 2e-5, "rtol": 1e-5}
            torch.testing.assert_close(
                output.logprobs[index, found], wanted.log_prob(torch.from_numpy(response)), **close
            )
            torch.testing.assert_close(output.entropies[index, found], wanted.entropy(), **close)
            torch.testing.assert_close(output.values[index, found], values, **close)
            assert all(x[index, len(response) :].eq(0).all() for x in (output.logprobs, output.values))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_what_lies_in_the_padding_changes_nothing(family: str) -> None:
    model = CausalLMWithValueHead(make(family), temperature=1.0)
    rows = pack([[0], [3]], PROMPTS, RESPONSES)
    clean = model(rows)
    clean.logprobs.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    rows.input_ids[rows.seen_until == 0] = 17
    dirty = model(rows)
    dirty.logprobs.sum().backward()
    assert dirty.logprobs.tolist() == clean.logprobs.tolist()
    assert dirty.values.tolist() == clean.values.tolist()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_several_sequences_in_a_row_of_a_model_with_a_window_are_refused() -> None:
    model = CausalLMWithValueHead(make("mistral"), temperature=1.0)
    with pytest.raises(ValueError, match="row_width=0"):
        model(pack([[0, 1]], PROMPTS, RESPONSES))


def test_a_model_that_scales_its_logits_is_refused() -> None:
    with pytest.raises(InputError, match="logit_scale"):
        CausalLMWithValueHead(make("cohere"), temperature=1.0)


def test_bfloat16_computes_close_to_float32_and_says_so_in_float32() -> None:
    model = CausalLMWithValueHead(make("llama", tie_word_embeddings=True), temperature=1.0)
    rows = pack([[0, 1], [3]], PROMPTS, RESPONSES)
    exact = model(rows)
    for parameter in model.causal_lm.parameters():
        cast(parameter, torch.bfloat16)
    rough = model(rows)
    difference = (exact.logprobs - rough.logprobs).detach().abs().max()
    assert 1e-5 < float(difference) < 0.5
    assert rough.states.dtype == torch.bfloat16
    assert rough.logprobs.dtype == rough.values.dtype == torch.float32


def test_the_value_head_follows_from_its_seed() -> None:
    model = make("llama")
    state = torch.get_rng_state()
    heads = [CausalLMWithValueHead(model, temperature=1.0, value_head_seed=seed).value_head for seed in (1, 1, 2)]
    first, same, other = (head.weight for head in heads)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_a_critic_estimates_the_values_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    causal_lm, other = make("llama"), make("gpt2").base_model
    model = CausalLMWithCritic(causal_lm, other, temperature=0.8)
    rows = pack([[0, 1], [3]], PROMPTS, RESPONSES)
    output, plain = model(rows), ResponseLM(causal_lm, temperature=0.8)(rows)
    assert torch.equal(output.logprobs, plain.logprobs)
    for place, index in enumerate(rows.sequences):
        input_ids = torch.from_numpy(np.concatenate([PROMPTS[index], RESPONSES[index]]))[None]
        wanted = model.value_head(other(input_ids).last_hidden_state[0, len(PROMPTS[index]) - 1 : -1])[:, 0]
        torch.testing.assert_close(output.values[place, : len(wanted)], wanted, atol=2e-5, rtol=1e-5)
    assert torch.equal(model.forward_values(rows), output.values)
    output.values.sum().backward()
    assert all(parameter.grad is None for parameter in model.policy_parameters())
    assert all(parameter.grad is not None for parameter in model.value_head.parameters())
    parameters = [*model.policy_parameters(), *model.value_parameters()]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == set(model.parameters())
    save_policy(model, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "critic")
    again = CausalLMWithCritic(causal_lm, loaded, temperature=0.8, value_head_seed=1)
    again.load_value_head(tmp_path / "critic")
    assert torch.equal(again.forward_values(rows), output.values)


def test_value_head_saves_and_loads(tmp_path: Path) -> None:
    first, second = (CausalLMWithValueHead(make("gpt2"), temperature=1.0, value_head_seed=seed) for seed in (1, 2))
    save_policy(first, tmp_path)
    second.load_value_head(tmp_path)
    assert torch.equal(first.value_head.weight, second.value_head.weight)
    assert torch.equal(first.value_head.bias, second.value_head.bias)
    (tmp_path / "nothing").mkdir()
    second.load_value_head(tmp_path / "nothing")  # a folder without one leaves the head as it is
    assert torch.equal(first.value_head.weight, second.value_head.weight)
    safetensors.torch.save_file({"weight": torch.zeros(1, 7)}, tmp_path / VALUE_HEAD_FILE)
    with pytest.raises(InputError, match=r"value_head\.safetensors holds .*\(1, 7\).*this model needs .*\(1, 32\)"):
        second.load_value_head(tmp_path)
