"""Quantised linear maps: their codes, what they compute, and what is made of them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ppo_ray.config import LoraConfig
from ppo_ray.errors import InputError
from ppo_ray.models.adapter_files import make_adapter_config
from ppo_ray.models.loading import load_causal_lm
from ppo_ray.models.lora import adapter_layers, add_adapters, base_weights, matrices, merge_weights, without_adapters
from ppo_ray.models.quantization import (
    QuantizedMap,
    linear_maps,
    named_tensors,
    quantize,
    set_dtype,
    unquantize,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is one of the packages for GPUs")

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 1, 1, 2, 3]])
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)
"""Dettmers et al. 2023, appendix E."""


@pytest.fixture(params=["llama", "gpt2"])
def base(request: Any, tiny_policy: Path) -> Any:
    """GPT-2 keeps its weights transposed."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval()
    return AutoModelForCausalLM.from_pretrained(tiny_policy).eval()


def make_map(weight: torch.Tensor, kind: Any, bias: torch.Tensor | None = None) -> QuantizedMap:
    """Return a linear map of codes, of the only map of a model."""
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight.data = weight.clone()
    if bias is not None:
        plain.bias.data = bias.clone()
    model = torch.nn.ModuleList([plain])
    model.get_output_embeddings = lambda: None  # type: ignore[attr-defined]
    model.config = type("Config", (), {"name_or_path": "toy"})()  # type: ignore[assignment]
    quantize(model, kind, CPU)
    found = model[0]
    assert isinstance(found, QuantizedMap)
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 100), st.integers(0, 2**31), st.sampled_from([1e-3, 0.02, 3.0]))
def test_codes_stand_for_the_nearest_weights_that_they_can(rows: int, columns: int, seed: int, size: float) -> None:
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    eight = make_map(weight, "int8").weight
    step = weight.half().float().abs().amax(1, keepdim=True) / 127
    assert ((eight - weight).abs() <= 0.5 * step + 1e-3 * weight.abs() + 1e-7).all()
    assert torch.allclose(eight / step, (eight / step).round(), atol=1e-3)
    four = make_map(weight, "nf4").weight
    assert four.shape == weight.shape
    for block, found in zip(weight.reshape(-1).split(64), four.reshape(-1).split(64), strict=True):
        scale = block.abs().max()
        codes = (block[:, None] / scale - NF4).abs().argmin(1)
        # the scale of a block is a code too, of 8 bits: it is a few hundredths off at most, and one for the block
        ratio = float((found @ (NF4[codes] * scale)) / (NF4[codes] * scale).square().sum())
        assert ratio == pytest.approx(1, abs=0.35)
        assert torch.allclose(found, ratio * NF4[codes] * scale, atol=1e-4 * float(scale))


def test_codes_by_hand() -> None:
    weight = torch.tensor([[127.0, 1.0, -64.4, 0.4], [0.5, 0.25, 0.0, -0.5]])
    assert make_map(weight, "int8")._buffers["codes"].tolist() == [[127, 1, -64, 0], [127, 64, 0, -127]]
    assert make_map(weight, "int8").weight[1].tolist() == pytest.approx([0.5, 64 / 254, 0.0, -0.5])
    four = make_map(torch.tensor([[1.0, -1.0, 0.5, 0.04, 0.03, 0.0]]), "nf4")
    assert four._buffers["codes"].flatten().tolist() == [0xF0, 0xC8, 0x77]  # two to a byte, the first in its upper half
    assert four.weight.flatten().tolist() == pytest.approx([1.0, -1.0, 0.44070983, 0.0795803, 0.0, 0.0])
    assert (
        make_map(torch.zeros(3, 70), "nf4").weight.abs().max() == 0 == make_map(torch.zeros(3, 7), "int8").weight.max()
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_computes_with_what_its_codes_stand_for_whatever_the_number_of_tokens(kind: Any, dtype: Any) -> None:
    torch.manual_seed(1)
    bias = torch.randn(96)
    found = make_map(torch.randn(96, 70), kind, bias)
    exact = found.weight
    set_dtype(found, dtype)
    found.bias.data = bias.to(dtype)  # type: ignore[union-attr]
    assert torch.equal(found.weight, exact.to(dtype))  # rounded once
    for shape in ((1, 70), (1, 1, 70), (2, 5, 70)):  # of one token bitsandbytes' own layer makes another product
        x = (100 * torch.randn(shape)).to(dtype).requires_grad_()
        own = x.detach().clone().requires_grad_()
        gradient = torch.randn(*shape[:-1], 96).to(dtype)
        y, wanted = found(x), linear(own, exact.to(dtype), bias.to(dtype))
        y.backward(gradient)
        wanted.backward(gradient)
        assert torch.equal(y, wanted) and x.grad is not None and own.grad is not None
        assert (x.grad - own.grad).abs().max() <= 1e-5 * own.grad.abs().max()
    assert [name for name, _ in found.named_parameters()] == ["bias"]


def test_no_pass_keeps_the_weights_that_it_made() -> None:
    found = make_map(torch.randn(64, 64), "nf4")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert kept == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_maps_of_a_model_get_codes_and_embeddings_and_norms_do_not(kind: Any, base: Any) -> None:
    plain, names = copy.deepcopy(base), [name for name, _ in base.named_parameters()]
    weights = {f"{name}.weight" for name in linear_maps(base)}
    quantize(base, kind, CPU)
    assert {name for name, _ in base.named_parameters()} == set(names) - weights
    assert len(weights) == 14 if base.config.model_type == "llama" else 8
    assert not {name for name in weights if "lm_head" in name or "embed" in name or "wte" in name}
    logits = base(IDS).logits
    assert (logits - plain(IDS).logits).abs().max() > 1e-4
    unquantize(base)
    assert [name for name, _ in base.named_parameters()] == names
    assert [type(module) for module in base.modules()] == [type(module) for module in plain.modules()]
    assert (base(IDS).logits - logits).abs().max() < 1e-5
    changed = {name for name, tensor in base.named_parameters() if not torch.equal(tensor, plain.get_parameter(name))}
    assert changed == weights


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_on_codes_merge_to_what_they_compute(kind: Any, base: Any) -> None:
    names = [(name, tuple(tensor.shape)) for name, tensor in base.named_parameters()]
    plain = copy.deepcopy(base)
    quantize(base, kind, CPU)
    before = base(IDS).logits
    add_adapters(base, make_adapter_config(LoraConfig(rank=4), "toy"), 0)
    assert {tensor.dtype for _, tensor in base.named_parameters()} == {torch.float32}
    assert torch.equal(base(IDS).logits, before)
    torch.manual_seed(7)
    for layer in adapter_layers(base).values():
        torch.nn.init.normal_(matrices(layer)[1], std=0.1)
    after = base(IDS).logits
    assert (after - before).abs().max() > 0.1
    with without_adapters(base):
        assert torch.equal(base(IDS).logits, before)
    merged = dict(merge_weights(base))
    assert [(name, tuple(tensor.shape)) for name, tensor in merged.items()] == names
    plain.load_state_dict(merged, strict=False)
    plain.tie_weights()
    assert (plain(IDS).logits - after).abs().max() < 2e-4

    after.sum().backward()
    found = {name: tensor.grad for name, tensor in base.named_parameters() if tensor.grad is not None}
    assert len(found) == 2 * len(adapter_layers(base)) and all(grad.abs().max() > 0 for grad in found.values())
    unquantize(base)  # the same adapters on plain weights
    for tensor in base.parameters():
        tensor.grad = None
    base(IDS).logits.sum().backward()
    for name, grad in found.items():
        assert torch.allclose(base.get_parameter(name).grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max())), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_kept_is_small_and_all_of_it_is_in_the_checksum(kind: Any, tiny_policy: Path) -> None:
    model = load_causal_lm(str(tiny_policy), quantization=kind)
    plain = load_causal_lm(str(tiny_policy))
    weights = sum(module.weight.numel() for module in linear_maps(plain).values())
    codes = dict(named_tensors(model)).items() - dict(model.named_parameters()).items()
    bits = 8 * sum(tensor.numel() * tensor.element_size() for _, tensor in codes) / weights
    assert bits == pytest.approx(4.127 if kind == "nf4" else 8 + 32 / 150, rel=0.02)
    function = {name: tensor.clone() for name, tensor in base_weights(model)}
    for name, tensor in codes:
        tensor.add_(1)
        assert {one for one, now in base_weights(model) if not torch.equal(now, function[one])} == {name}
        tensor.copy_(function[name])


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="the model 'toy': 0: weights of up to 1e.05 do not fit into int8"):
        make_map(torch.tensor([[1e5, 1.0]]), "int8")  # its scale is of a float16


@pytest.mark.parametrize("stored", ["bitsandbytes", "fp8", "gptq"])
def test_a_base_that_is_stored_in_codes_is_refused(stored: str, tiny_policy: Path) -> None:
    from transformers import AutoConfig

    from ppo_ray.models.support import find_config_problem

    config = AutoConfig.from_pretrained(tiny_policy)
    assert find_config_problem(config) is None
    config.quantization_config = {"quant_method": stored}
    for is_critic in (False, True):
        assert f"is stored in codes ({stored} in quantization_config" in str(find_config_problem(config, is_critic))
    assert json.loads((tiny_policy / "config.json").read_text()).get("quantization_config") is None
