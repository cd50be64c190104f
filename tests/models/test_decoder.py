"""What is found out about a decoder; and its layers, computed again in the backward pass with dropout off."""

from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ppo_ray.errors import InputError
from ppo_ray.models.actor_critic import CausalLMWithCritic, CausalLMWithValueHead
from ppo_ray.models.decoder import Decoder, decoder_layers, recompute_layers
from ppo_ray.models.packing import PackedRows, pack


def policy(family: str) -> CausalLMWithValueHead:
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=3, num_attention_heads=2, **sizes))
    else:  # its layers themselves apply dropout, in training mode
        sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5}
        model = OPTForCausalLM(OPTConfig(vocab_size=50, num_hidden_layers=3, num_attention_heads=2, **sizes))
    return CausalLMWithValueHead(model.eval(), temperature=1.0)


def rows() -> PackedRows:
    sequences = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    return pack([[0, 1], [2]], sequences, [list(reversed(ids)) for ids in sequences])


def backpropagate(model: CausalLMWithValueHead) -> tuple[dict[str, torch.Tensor], int, int]:
    """Return the gradients, how often a layer was computed, and how many figures were kept for the backward pass."""
    calls, kept = 0, 0

    def count(*unused: object) -> None:
        nonlocal calls
        calls += 1

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel()
        return tensor

    norm = next(child for child in decoder_layers(model)[0].modules() if "norm" in type(child).__name__.lower())
    handle = norm.register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(rows())
        loss = output.logprobs.sum() + output.values.square().sum()
        kept_in_forward = kept
    loss.backward()
    handle.remove()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, calls, kept_in_forward


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_gradients_are_the_same_and_less_is_kept(family: str) -> None:
    wanted, calls, kept = backpropagate(policy(family))
    model = policy(family)
    recompute_layers(model)
    found, more_calls, less_kept = backpropagate(model)
    assert (calls, more_calls) == (1, 2)
    assert less_kept < kept / 2
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    assert not any(module.training for module in model.causal_lm.modules())


def test_layers_are_found_once_each_and_in_order() -> None:
    model = policy("llama")
    assert decoder_layers(model) == list(model.causal_lm.model.layers)


def test_a_model_without_layers_that_are_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"the layers of Linear cannot be told.*learner\.gradient_checkpointing"):
        decoder_layers(torch.nn.Linear(2, 2))


def decoder_only(family: str) -> Any:
    torch.manual_seed(0)
    ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    seq2seq = {**ids, **heads, "d_model": 16, "decoder_ffn_dim": 24, "encoder_ffn_dim": 24, "init_std": 0.3}
    block = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    configs = {
        "bart": lambda: transformers.BartConfig(**seq2seq),
        "marian": lambda: transformers.MarianConfig(**seq2seq),
        "pegasus": lambda: transformers.PegasusConfig(**seq2seq),
        "llama4_text": lambda: transformers.Llama4TextConfig(
            **{**ids, "pad_token_id": None},
            **block,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size_mlp=24,
            num_local_experts=2,
            attention_chunk_size=8,
            initializer_range=0.3,
        ),
        "opt_projecting": lambda: OPTConfig(
            **ids,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
            init_std=0.3,
        ),
        "electra": lambda: transformers.ElectraConfig(**ids, **block, embedding_size=8, is_decoder=True),
        "rembert": lambda: transformers.RemBertConfig(
            **ids, **block, input_embedding_size=8, output_embedding_size=8, is_decoder=True
        ),
        "bert": lambda: transformers.BertConfig(**ids, **block, is_decoder=True),
        "gemma2": lambda: transformers.Gemma2Config(**ids, **block, head_dim=8, num_key_value_heads=2),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()


@pytest.mark.parametrize("family", ["llama4_text", "opt_projecting"])
def test_decoders_that_lie_elsewhere_or_project_their_last_state(family: str) -> None:
    causal_lm = decoder_only(family)
    model = CausalLMWithValueHead(causal_lm, temperature=0.5)
    prompts, responses = [[5, 6, 7], [8, 9]], [[9, 8, 7, 6, 5, 4, 3, 11, 12], [21, 22]]
    with torch.no_grad():
        output = model(pack([[0], [1]], prompts, responses))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            plain = causal_lm(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            wanted = (plain / 0.5).log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
            assert wanted.std() > 0.1
            torch.testing.assert_close(output.logprobs[row, : len(response)], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bart", r"is the decoder of an encoder-decoder \(BartForCausalLM\), which engines cannot sample from"),
        ("marian", "is the decoder of an encoder-decoder"),
        ("pegasus", "is the decoder of an encoder-decoder"),
        ("electra", "more between its last hidden state and its logits than a linear output embedding"),
        ("rembert", "more between its last hidden state and its logits than a linear output embedding"),
        ("bert", "more between its last hidden state and its logits than a linear output embedding"),
        ("gemma2", r"changes its logits .*'final_logit_softcapping': 30.0"),  # its logits are far below the cap
    ],
)
def test_other_heads_are_refused_in_words(family: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        CausalLMWithValueHead(decoder_only(family), temperature=1.0)


def test_a_critic_whose_last_state_has_another_width_than_its_layers() -> None:
    causal_lm = decoder_only("opt_projecting")
    critic = decoder_only("opt_projecting").base_model
    model = CausalLMWithCritic(causal_lm, critic, temperature=1.0)
    assert model.value_head.weight.shape == (1, 16)
    values = model(rows()).values
    with torch.no_grad():
        wanted = model.value_head(critic(torch.tensor([[8, 9]])).last_hidden_state[0, 1])
    torch.testing.assert_close(values[1, 0], wanted[0])


def test_an_encoder_decoder_is_no_critic() -> None:
    critic = transformers.BartModel(decoder_only("bart").config.__class__(d_model=16, encoder_layers=1, vocab_size=50))
    with pytest.raises(InputError, match=r"is an encoder-decoder \(bart\)"):
        CausalLMWithCritic(decoder_only("opt_projecting"), critic, temperature=1.0)


def rotary(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0}
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=rope)).eval()
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 8.0, 8.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, **factors}
    config = transformers.Phi3Config(
        **sizes,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_go_by_the_longest_of_a_pass_are_refused_where_they_do(kind: str) -> None:
    causal_lm = rotary(kind)
    model = CausalLMWithValueHead(causal_lm, temperature=1.0)
    prompts, responses = (
        [[5, 6, 7], [8, 9, 10]],
        [[9, 8, 7, 6], list(range(20, 34))],
    )  # 16 inputs, the last token is none
    logprobs = model(pack([[0], [1]], prompts, responses)).logprobs
    torch.testing.assert_close(
        logprobs[0, :4], model(pack([[0]], prompts, responses)).logprobs[0], atol=2e-5, rtol=1e-5
    )
    with pytest.raises(InputError, match=f"a sequence of 17 tokens: beyond 16, the {kind} positions"):
        model(pack([[0], [1]], prompts, [responses[0], [*responses[1], 40]]))
    with torch.no_grad():  # what it would have been: the same tokens, another neighbour
        ids = torch.tensor([prompts[0] + responses[0] + [0] * 13, list(range(20, 40))])
        positions = torch.arange(20).expand(2, -1)
        beside = causal_lm(ids, position_ids=positions).logits[0, :7].log_softmax(-1)
        alone = causal_lm(ids[:1, :7]).logits[0].log_softmax(-1)
    assert (beside - alone).abs().max() > 0.01


def test_tokens_with_equal_embeddings_hide_nothing() -> None:
    """The first ids of a vocabulary are often special tokens that were never trained, all alike."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=300, initializer_range=0.5, **sizes)).eval()
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight[:100] = 0.1
    with pytest.raises(InputError, match="looks ahead"):
        Decoder(bert)
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight[:] = 0.1
    with pytest.raises(InputError, match="the same embedding for all tokens"):
        Decoder(bert)


@pytest.mark.parametrize("vocab_size", [2, 3, 5, 8])
def test_small_vocabularies(vocab_size: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).eval().model).traits.packs
    with pytest.raises(InputError, match="looks ahead"):
        Decoder(transformers.BertModel(transformers.BertConfig(vocab_size=vocab_size, **sizes)).eval())


def test_a_model_that_computes_nan_is_said_to() -> None:
    model = policy("llama").causal_lm
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(InputError, match="computes NaN or infinite states"):
        CausalLMWithValueHead(model, temperature=1.0)


def test_a_model_for_which_memory_is_too_small_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy("llama").causal_lm

    def run_out(*unused: Any, **unused_too: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model.model, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(model.model)


def test_a_config_of_ones_own_is_that_which_it_derives_from() -> None:
    class Own(LlamaConfig):
        pass

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    CausalLMWithValueHead(LlamaForCausalLM(Own(vocab_size=50, **sizes)).eval(), temperature=1.0)
