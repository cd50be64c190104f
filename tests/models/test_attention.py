"""Sequences end to end in a row without a mask: as under one, in every kernel, and never where more is wanted."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ppo_ray.models import attention, block_attention
from ppo_ray.models.actor_critic import CausalLMWithValueHead
from ppo_ray.models.attention import attend, make_bounds
from ppo_ray.models.decoder import recompute_layers
from ppo_ray.models.packing import PackedRows, pack


def make_policy(family: str) -> CausalLMWithValueHead:
    torch.manual_seed(0)
    if family == "llama":  # with fewer heads of keys than of queries
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, initializer_range=0.3, **sizes))
    else:
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **ids))
    return CausalLMWithValueHead(model.eval(), temperature=1.0)


def draw_row(sizes: list[tuple[int, int]]) -> PackedRows:
    draw = np.random.default_rng(len(sizes))
    prompts, responses = ([draw.integers(0, 50, size[part]) for size in sizes] for part in range(2))
    return pack([list(range(len(sizes)))], prompts, responses)


def differentiate(policy: CausalLMWithValueHead, rows: PackedRows) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = policy(rows)
    weights = torch.randn(output.logprobs.shape, generator=torch.Generator().manual_seed(1))
    loss = (weights * (output.logprobs + output.values)).sum()
    return output.logprobs.detach(), torch.autograd.grad(loss, list(policy.parameters()))


def check(policy: CausalLMWithValueHead, rows: PackedRows) -> None:
    """Compare a row by its bounds with the same row under a mask."""
    assert policy.traits.takes_bounds and rows.bounds is not None
    found, gradients = differentiate(policy, rows)
    known = policy.decoder.traits
    policy.decoder.traits = replace(known, takes_bounds=False)
    wanted, right = differentiate(policy, rows)
    policy.decoder.traits = known
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    for gradient, other in zip(gradients, right, strict=True):
        assert (gradient - other).norm() <= 1e-4 * other.norm() + 1e-5


def varlen_stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Compute what torch's kernel does on a GPU, sequence by sequence."""
    assert window_size == (-1, 0) and enable_gqa and cu_seq_q.dtype == torch.int32 and cu_seq_q.is_contiguous()
    bounds = cu_seq_q.tolist()
    assert max_q == max_k == max(stop - start for start, stop in pairwise(bounds)) and bounds == cu_seq_k.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(query) == len(key) == len(value)
    parts = []
    for start, stop in pairwise(bounds):
        alone = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        parts.append(sdpa(*alone, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> CausalLMWithValueHead:
    return make_policy(request.param)


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=9)
"""Of prompts and responses: sequences are shorter and longer than the 8 units of a head."""


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES)
def test_bounds_do_what_a_mask_does(policy: CausalLMWithValueHead, sizes: list[tuple[int, int]]) -> None:
    check(policy, draw_row(sizes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_are_computed_again_have_the_bounds_then(family: str) -> None:
    policy = make_policy(family)
    recompute_layers(policy)
    check(policy, draw_row([(3, 4), (1, 1), (2, 5)]))


def test_a_gpus_kernel_is_given_flat_tensors_and_bounds(
    policy: CausalLMWithValueHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(*tensors: Any, **options: Any) -> torch.Tensor:
        calls.append(len(tensors[3]))
        return varlen_stand_in(*tensors, **options)

    monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", count)
    check(policy, draw_row([(3, 4), (1, 1), (1, 1), (2, 5), (5, 2)]))
    assert calls == [6, 6]  # once a layer, with the bounds of five sequences


def test_no_sequence_is_touched_by_its_neighbours(policy: CausalLMWithValueHead) -> None:
    prompts, responses = [np.array([3, 4]), np.array([5]), np.array([6, 7])], [np.array([8, 9])] * 3
    first = policy(pack([[0, 1, 2]], prompts, responses)).logprobs[1]
    other = policy(pack([[0, 1, 2]], [prompts[2], prompts[1], prompts[0]], responses)).logprobs[1]
    torch.testing.assert_close(first, other, atol=1e-6, rtol=1e-6)


def test_a_row_of_one_long_sequence_is_plain_causal_attention(
    policy: CausalLMWithValueHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "_LONGEST", 32)
    given_masks = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        given_masks.append((options["attn_mask"], options["is_causal"]))
        return sdpa(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    policy(draw_row([(20, 20)]))
    assert given_masks == [(None, True)] * 2


@pytest.mark.parametrize("masked", [None, torch.bool, torch.bfloat16])
def test_on_a_cpu_short_sequences_of_16_bits_are_attended_to_in_float32(masked: torch.dtype | None) -> None:
    draw = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    tensors = [torch.randn(1, heads, 19, 16, generator=draw).to(torch.bfloat16) for heads in (4, 2, 2)]
    mask = make_bounds([5, 5, 9])
    if masked is not None:
        allowed = torch.ones(19, 19, dtype=torch.bool).tril()[None, None]
        mask = allowed if masked == torch.bool else torch.zeros(1, 1, 19, 19, dtype=masked).masked_fill(~allowed, -1e9)
    module.num_key_value_groups = 2
    leaves, exact = (
        [tensor.detach().to(dtype).requires_grad_() for tensor in tensors] for dtype in (torch.bfloat16, torch.float32)
    )
    found, _ = attend(module, *leaves, mask)
    wanted, _ = attend(module, *exact, mask.float() if mask.is_floating_point() else mask)
    assert torch.equal(found, wanted.to(torch.bfloat16))
    gradient = torch.randn(found.shape, generator=draw).to(torch.bfloat16)
    found.backward(gradient)
    wanted.backward(gradient.float())
    for one, other in zip(leaves, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad.to(torch.bfloat16))


def test_short_sequences_are_padded_where_at_most_half_is_padding() -> None:
    group = attention._group
    assert group([9, 9, 4, 3, 3, 1], padded_up_to=4) == [[9, 9], [4, 3, 3, 1]]
    assert group([4, 1, 1, 1], padded_up_to=4) == [[4, 1, 1], [1]]  # 4 x 4 > 2 x 7
    assert group([1, 4, 2, 9, 4], padded_up_to=4) == [[1, 4, 2], [9], [4]]
    assert group([4, 3, 3], padded_up_to=0) == [[4], [3, 3]]
    assert group([5], padded_up_to=4) == [[5]]


def attend_one_by_one(tensors: list[torch.Tensor], lengths: list[int], scale: float | None = None) -> torch.Tensor:
    alone = zip(*(tensor[0].split(lengths, 1) for tensor in tensors), strict=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([sdpa(*one, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1) for one in alone])[None]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kept", [9, 4], ids=["kept", "computed again"])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (2, 2)])
def test_attention_in_blocks_and_its_gradients_are_exact(
    heads: int, key_heads: int, kept: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, against finite differences and torch's own function, with heads of values as wide as they like."""
    monkeypatch.setattr(block_attention, "_BLOCK", 2)
    monkeypatch.setattr(block_attention, "_KEPT", kept)
    draw = torch.Generator().manual_seed(0)
    lengths, module = [3, 6, 1, 5], torch.nn.Module()
    sizes = ((heads, 6), (key_heads, 6), (key_heads, 3))
    tensors = [torch.randn(1, number, 15, width, generator=draw, dtype=torch.float64) for number, width in sizes]
    for tensor in tensors:
        tensor.requires_grad_()

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return attend(module, *tensors, make_bounds(lengths), scaling=scale)[0]

    assert torch.autograd.gradcheck(run, tensors)
    torch.testing.assert_close(run(*tensors), attend_one_by_one(tensors, lengths, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[33], [190, 127, 64], [100, 32, 96, 65], [300, 257]])
def test_blocks_of_long_sequences_are_what_torch_computes(lengths: list[int], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, heads, sum(lengths), 16, generator=draw).to(dtype).double() for heads in (6, 2, 2)]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in exact]
    for tensor in exact:
        tensor.requires_grad_()
    found, _ = attend(torch.nn.Module(), *tensors, make_bounds(lengths))
    wanted = attend_one_by_one(exact, lengths)
    grad = torch.randn(found.shape, generator=draw)
    gradients = torch.autograd.grad(found, tensors, grad.to(dtype))
    right = torch.autograd.grad(wanted, exact, grad.to(dtype).double())
    for one, other in zip((found, *gradients), (wanted, *right), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_which_sequences_are_attended_to_in_blocks() -> None:
    query, key = torch.empty(1, 4, 9, 16), torch.empty(1, 4, 9, 16)
    assert block_attention.pads_up_to(query, key) == 16
    assert block_attention.pads_up_to(query, key[:, :2]) == 512
    assert block_attention.pads_up_to(query.to("meta"), key[:, :2].to("meta")) == 0


def test_bounds_take_no_memory_by_their_length() -> None:
    bounds = make_bounds([3, 1, 4])
    assert bounds.shape == (1, 1, 4, 4) and bounds.dtype == torch.int32
    assert bounds[0, 0, :, 0].tolist() == [0, 3, 4, 8]
    assert bounds.untyped_storage().nbytes() == 16


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 4}, {"dropout": 0.1}, {"is_causal": False}, {"position_bias": torch.ones(1, 2, 8, 8)}],
)
def test_more_than_causal_attention_is_refused(options: dict[str, Any]) -> None:
    tensors = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="bounds are for causal attention alone"):
        attend(torch.nn.Module(), *tensors, make_bounds([5, 3]), **options)


def test_models_that_choose_what_they_attend_to_keep_their_masks() -> None:
    """They do so where they are told to attend by torch's function, by that name."""
    config = transformers.AutoConfig.for_model("deepseek_v32")
    assert not attention.use_bounds(_Unasked(config), lambda: True)


class _Unasked:
    """A model of that class, as far as it is asked."""

    def __init__(self, config: Any) -> None:
        self.config = config
        config._attn_implementation = "sdpa"
        model = transformers.AutoModel._model_mapping[type(config)]
        type(self).__module__ = model.__module__
        self._can_set_attn_implementation = model._can_set_attn_implementation


def test_other_users_of_a_model_have_its_masks(policy: CausalLMWithValueHead) -> None:
    """Padding at the left, as where text is generated in batches."""
    ids = torch.tensor([[9, 5, 6, 7]])
    padded, mask = torch.tensor([[1, 1, 9, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = policy.causal_lm(ids).logits
    found = policy.causal_lm(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
