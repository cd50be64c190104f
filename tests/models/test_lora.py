"""Adapters: what they compute, what is made of them and their base, their files, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ppo_ray.config import LoraConfig
from ppo_ray.errors import InputError
from ppo_ray.models.adapter_files import load_adapters, make_adapter_config, save_adapters
from ppo_ray.models.lora import (
    adapter_layers,
    add_adapters,
    find_target_problem,
    is_adapter,
    matrices,
    merge,
    merge_in_place,
    merge_weights,
    without_adapters,
)

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapt(model: Any, lora: LoraConfig, base: Path, seed: int = 0) -> Any:
    add_adapters(model, make_adapter_config(lora, str(base)), seed)
    return model


def fill(model: Any) -> Any:
    """Give B weights: new adapters change nothing."""
    torch.manual_seed(7)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(matrices(layer)[1], std=0.1)
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.fixture
def base(tiny_policy: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_policy).eval()


@pytest.fixture
def saved(tiny_policy: Path, base: Any, tmp_path: Path) -> Path:
    """Return a folder of adapters that change the tiny policy."""
    model = fill(adapt(base, LoraConfig(rank=4), tiny_policy))
    save_adapters(model, tmp_path / "adapters", trained(model))
    return tmp_path / "adapters"


def test_a_merge_by_hand() -> None:
    weight, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0], [2.0]])
    assert merge(weight, a, b, 0.5, transposed=False).tolist() == [[1.5, 7.0], [4.0, 14.0]]
    assert merge(weight, a, b, 0.5, transposed=True).tolist() == [[1.5, 3.0], [8.0, 14.0]]
    # 256 + 1 + 1 is 258 in float32, and 256 if bfloat16 rounds each sum
    small = torch.full((1, 2), 1.0)
    assert merge(torch.full((1, 1), 256.0).bfloat16(), small.T, small, 1.0, False).dtype == torch.bfloat16
    assert merge(torch.full((1, 1), 256.0).bfloat16(), small.T, small, 1.0, False).tolist() == [[258.0]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_change_nothing_at_first_and_merge_to_what_they_compute(
    kind: str, base: Any, tiny_policy: Path
) -> None:
    """GPT-2 keeps its weights transposed."""
    torch.manual_seed(0)
    if kind == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0)).eval()
    names = [name for name, _ in base.named_parameters()]
    before = base(IDS).logits
    model = adapt(base, LoraConfig(rank=4), tiny_policy)
    assert torch.equal(model(IDS).logits, before)
    after = fill(model)(IDS).logits
    assert (after - before).abs().max() > 0.1
    with without_adapters(model):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, after)
    merged = {name: tensor.clone() for name, tensor in merge_weights(model)}
    assert list(merged) == names
    merge_in_place(model)
    assert {name for name, tensor in model.named_parameters() if not torch.equal(tensor, merged[name])} == set()
    assert (model(IDS).logits - after).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_figures_and_gradients_are_those_of_pefts_own_pass(
    base: Any, tiny_policy: Path, kind: str, dtype: torch.dtype
) -> None:
    """The frozen weights are of `dtype`, adapters and their gradients in float32 or better."""
    if kind == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)).eval()
    model = fill(adapt(base, LoraConfig(rank=4), tiny_policy))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if is_adapter(name) else dtype)
    found = []
    for _ in range(2):
        logits = model(input_ids=IDS).logits
        model.zero_grad()
        logits.double().log_softmax(-1)[0, :, 3].sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in trained(model).values())])
        for layer in adapter_layers(model).values():
            vars(layer).pop("forward", None)  # then it is peft's
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def test_maps_of_the_same_input_keep_it_once_and_as_it_is() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in ("q", "k", "v")}).bfloat16()
    model.config = type("Config", (), {"name_or_path": "maps", "model_type": "maps"})()
    add_adapters(model, peft.LoraConfig(r=2, target_modules=["q", "k", "v"]), 0)
    for layer in adapter_layers(model).values():
        for matrix in matrices(layer)[:2]:
            matrix.data = matrix.data.float()
    inputs = torch.randn(100, 64).bfloat16().requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = sum(model[name](inputs).sum() for name in ("q", "k", "v"))
    frozen, adapters = 3 * 64 * 64 * 2, 3 * 2 * 64 * 2 * 4
    assert sum(kept.values()) == frozen + adapters + inputs.nbytes + 3 * 100 * 2 * 4  # and A x
    total.backward()
    assert inputs.grad is not None


def test_adapters_alone_are_trained_and_begin_by_the_seed(base: Any, tiny_policy: Path) -> None:
    first, second, other = (
        trained(adapt(AutoModelForCausalLM.from_pretrained(tiny_policy), LoraConfig(rank=4), tiny_policy, seed))
        for seed in (1, 1, 2)
    )
    assert sum(tensor.numel() for tensor in first.values()) == 2 * 4 * (
        (128 + 128) + 2 * (128 + 64) + (128 + 128) + 2 * (128 + 256) + (256 + 128)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_files_are_those_of_peft(saved: Path, base: Any, tiny_policy: Path, tmp_path: Path) -> None:
    """Format of peft 0.21: names, config, and what it reads back."""
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), saved)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "theirs"))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in ours)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in ours
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["peft_version"].startswith("0.21.")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(tiny_policy))
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 14

    again = adapt(AutoModelForCausalLM.from_pretrained(tiny_policy), LoraConfig(path=str(saved)), tiny_policy, 9)
    load_adapters(again, str(saved))
    assert torch.equal(again(IDS).logits, base(IDS).logits)
    assert (theirs(IDS).logits - base(IDS).logits).abs().max() < 1e-5
    save_adapters(again, tmp_path / "again", trained(again))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], "'q_prj' fits none of the model's modules; there are q_proj"),
        (["q_proj", "lm_head"], "'lm_head' is the model's output embedding"),
        (["embed_tokens"], "'embed_tokens' is the model's input embedding"),
        (["self_attn"], "'self_attn' is LlamaAttention, no linear map; there are down_proj"),
    ],
)
def test_targets_that_do_not_fit(base: Any, targets: list[str], words: str) -> None:
    assert words in str(find_target_problem(base, LoraConfig(targets=targets)))


def test_a_map_whose_weight_is_anothers_too(base: Any) -> None:
    layers = base.model.layers
    layers[0].self_attn.q_proj.weight = layers[1].self_attn.q_proj.weight
    assert "shares its weight with others" in str(find_target_problem(base, LoraConfig(targets=["q_proj"])))
    assert find_target_problem(base, LoraConfig(targets=["v_proj"])) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "no plain LoRA .*use_dora"),
        ({"bias": "all"}, "no plain LoRA .*bias"),
        ({"modules_to_save": ["lm_head"]}, "no plain LoRA .*modules_to_save"),
        ({"init_lora_weights": "pissa"}, "no plain LoRA .*pissa"),
        ({"some_later_variant": 3}, "no plain LoRA .*some_later_variant"),
        ({"peft_type": "IA3"}, "are of the kind IA3"),
        ({"base_model_name_or_path": "somebody/else-7b"}, "are of another base: somebody/else-7b"),
    ],
)
def test_adapters_of_another_kind_or_base(saved: Path, tiny_policy: Path, change: dict[str, Any], words: str) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=words):
        make_adapter_config(LoraConfig(path=str(saved)), str(tiny_policy))


def test_files_that_do_not_fit_or_are_damaged(saved: Path, tiny_policy: Path, base: Any, tmp_path: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    first = next(iter(tensors))
    for changed, words in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, "names differ"),
        (tensors | {first: torch.zeros(3, 3)}, r"\[3, 3\], the model's is"),
        (tensors | {first: tensors[first] * torch.nan}, "hold NaN"),
    ):
        save_file(changed, saved / "adapter_model.safetensors")
        with pytest.raises(InputError, match=words):
            load_adapters(base, str(saved))
    (saved / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_adapters(base, str(saved))
    shutil.rmtree(saved)
    with pytest.raises(InputError, match="holds no adapters"):
        make_adapter_config(LoraConfig(path=str(saved)), str(tiny_policy))
