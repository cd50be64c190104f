"""Saving and loading with the value head, over families that tie, project or convert their weights."""

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from ppo_ray.trl import AutoModelForCausalLMWithValueHead, create_reference_model

SIZES = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama_tied": transformers.LlamaConfig(**SIZES, **BLOCK, intermediate_size=48, tie_word_embeddings=True),
    "llama": transformers.LlamaConfig(**SIZES, **BLOCK, intermediate_size=48, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4),
    "opt_projecting": transformers.OPTConfig(
        **SIZES, **BLOCK, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "mixtral": transformers.MixtralConfig(
        **SIZES, **BLOCK, intermediate_size=48, num_key_value_heads=2, num_local_experts=2
    ),
}
HEAD = {"v_head.summary.weight", "v_head.summary.bias"}


def make(family: str = "llama_tied", bias: float = 0.25) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead(transformers.AutoModelForCausalLM.from_config(CONFIGS[family]))
    torch.nn.init.constant_(model.v_head.summary.bias, bias)
    return model


def assert_same(found: Any, wanted: Any) -> None:
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("shard_size", ["1GB", "5KB"])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_is_loaded_bit_by_bit(family: str, shard_size: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "5KB")
    assert_same(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), model)
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_same(plain, model.pretrained_model)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), HEAD)


@pytest.mark.parametrize("family", CONFIGS)
def test_values_are_those_of_the_state_that_the_logits_come_from(family: str) -> None:
    model = make(family).eval()
    input_ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    states = model.pretrained_model.base_model(input_ids).last_hidden_state
    torch.testing.assert_close(model(input_ids)[2], model.v_head.summary(states)[..., 0])
    assert model(input_ids)[2].grad_fn is not None


def test_weights_are_float32_unless_asked_as_under_trl(tmp_path: Path) -> None:
    AutoModelForCausalLMWithValueHead(make().pretrained_model.bfloat16()).save_pretrained(tmp_path)
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).pretrained_model.dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert model.pretrained_model.dtype == torch.bfloat16
        logits, _, values = model(torch.tensor([[5, 6, 7]]))
        assert model.v_head.summary.weight.dtype == logits.dtype == values.dtype == torch.float32


def test_the_file_that_transformers_takes_brings_the_value_head(tmp_path: Path) -> None:
    make(bias=1.0).save_pretrained(tmp_path, max_shard_size="5KB")
    make(bias=2.0).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()  # transformers leaves it, and does not read it
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).v_head.summary.bias.item() == 2.0


def test_the_value_head_comes_from_where_the_model_does(tmp_path: Path) -> None:
    make(bias=1.0).save_pretrained(tmp_path)
    make(bias=2.0).save_pretrained(tmp_path / "inner")
    make(bias=3.0).save_pretrained(tmp_path, variant="other")
    for where, bias in (({}, 1.0), ({"subfolder": "inner"}, 2.0), ({"variant": "other"}, 3.0)):
        assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **where).v_head.summary.bias.item() == bias


def test_pickled_weights_are_not_read_and_can_be_converted_as_the_error_says(tmp_path: Path) -> None:
    model = make()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="only safetensors are loaded") as caught:
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    (command,) = re.findall(r'python -c "(.*)"$', str(caught.value))
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert_same(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), model)


def test_what_a_file_lacks_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "ppo_ray"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert [(record.levelname, "with its value head" in record.message) for record in caplog.records] == [
        ("INFO", True)
    ]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["other.weight"] = tensors.pop("lm_head.weight")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"files lack lm_head.weight; .*no place for, other.weight$"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("other.weight")[:40].clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"another shape: lm_head.weight \(\[40, 32\], by config.json \[50, 32\]\)$"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, ignore_mismatched_sizes=True)  # a new one is asked for
    tensors["lm_head.weight"] = torch.full((50, 32), torch.nan)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has NaN or infinite weights: lm_head.weight; its files are damaged$"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_code_in_a_folder_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_other_arguments_that_cannot_be_honoured(tmp_path: Path) -> None:
    model = make().pretrained_model
    with pytest.raises(ValueError, match="use_safetensors=False"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match=r"\['dtype'\] cannot be honoured: the model is loaded already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model, dtype=torch.float32)
    with pytest.raises(ValueError, match="a folder, a hub name or a causal LM"):
        AutoModelForCausalLMWithValueHead.from_pretrained(5)
    with pytest.raises(ValueError, match="no language-model head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model.model)
    apart = make("llama").pretrained_model
    apart.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"lies on \['cpu', 'meta'\]"):
        AutoModelForCausalLMWithValueHead.from_pretrained(apart)


def test_a_push_has_the_value_head_and_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pushed = make(), {}
    names = set(model.pretrained_model.state_dict())
    monkeypatch.setattr(
        model.pretrained_model,
        "push_to_hub",
        lambda name: pushed.update({name: set(model.pretrained_model.state_dict())}),
    )
    model.push_to_hub("me/mine")
    assert pushed == {"me/mine": names | HEAD}
    assert set(model.pretrained_model.state_dict()) == names


@pytest.mark.parametrize(
    ("family", "num_layers", "pattern", "shared"),
    [
        ("llama", 1, None, ("embed_tokens", "layers.0.")),
        ("llama_tied", 0, None, ("embed_tokens",)),
        ("gpt2", 1, None, ("wte", "wpe", "h.0.")),
        ("opt_projecting", 1, None, ("embed_", "project_", "layers.0.")),
        ("gpt2", 1, "h.{layer}.mlp", ("wte", "wpe", "h.0.", "h.1.ln_1", "h.1.attn", "h.1.ln_2")),
    ],
)
def test_shared_layers_are_the_same_tensors_and_frozen(
    family: str, num_layers: int, pattern: str | None, shared: tuple[str, ...]
) -> None:
    model = make(family)
    reference = create_reference_model(model, num_layers, pattern)
    for name, parameter in model.named_parameters():
        is_shared = any(part in name for part in shared)
        assert (reference.get_parameter(name) is parameter) == is_shared, name
        assert parameter.requires_grad != is_shared, name
        assert torch.equal(reference.get_parameter(name), parameter)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert model.training and not reference.training


def test_a_pattern_that_fits_nothing_is_refused_and_freezes_nothing() -> None:
    model = make("gpt2")
    for arguments in ((2, None), (1, "layer.{layer}")):  # TRL freezes the whole model at the second
        with pytest.raises(ValueError, match="no parameter is named like"):
            create_reference_model(model, *arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_generation_config_that_transformers_would_not_save_is_saved(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "first")
    content = '{"temperature": 0.9,   "top_p": 0.6}'
    (tmp_path / "first" / "generation_config.json").write_text(content)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "generation_config.json").read_text() == content
    assert_same(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "second"), model)
    model.pretrained_model.generation_config.top_k = 7  # what the caller changes is what is saved
    model.save_pretrained(tmp_path / "third")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "third")
    assert (found.temperature, found.top_p, found.top_k) == (0.9, 0.6, 7)
