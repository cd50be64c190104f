"""Decoder layers: found by their names, and computed again in the backward pass with dropout off."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ppo_ray.errors import InputError
from ppo_ray.models.actor_critic import CausalLMWithValueHead
from ppo_ray.models.decoder import decoder_layers, recompute_layers
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
