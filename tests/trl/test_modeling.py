from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from ppo_ray.trl import AutoModelForCausalLMWithValueHead, create_reference_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(tiny_policy: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead.from_pretrained(str(tiny_policy)).eval()


def test_forward_is_the_model_and_a_linear_map_of_its_last_state(model: Any, tiny_policy: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    with torch.no_grad():
        logits, loss, values = model(IDS)
        output = plain(IDS, output_hidden_states=True)
        wanted = output.hidden_states[-1] @ model.v_head.summary.weight.T + model.v_head.summary.bias
    assert torch.equal(logits, output.logits) and loss is None
    torch.testing.assert_close(values, wanted[..., 0])
    assert len(model(IDS, return_past_key_values=True)) == 4
    assert float(model(IDS, labels=IDS)[1]) == pytest.approx(float(plain(IDS, labels=IDS).loss), rel=1e-6)


def test_what_is_saved_is_what_trl_saves_and_loads_everywhere(model: Any, tmp_path: Path) -> None:
    torch.nn.init.constant_(model.v_head.summary.bias, 0.25)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name for name in saved if name.startswith("v_head.")} == {"v_head.summary.weight", "v_head.summary.bias"}
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.pretrained_model.parameters(), strict=True))


def test_a_sharded_checkpoint_brings_its_value_head(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


def test_a_model_without_a_saved_value_head_gets_a_new_one(tiny_policy: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.nn.Linear(128, 1).weight
    torch.manual_seed(1)
    assert torch.equal(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy).v_head.summary.weight, wanted)
    normal = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_policy, v_head_init_strategy="normal", v_head_initializer_range=0.5
    )
    assert float(normal.v_head.summary.weight.std()) == pytest.approx(0.5, rel=0.3)
    assert float(normal.v_head.summary.bias) == 0


def test_dropout_is_in_the_value_head_and_off_in_eval(model: Any) -> None:
    assert model.v_head.dropout.p == 0.1
    with torch.no_grad():
        assert torch.equal(model(IDS)[2], model(IDS)[2])
        model.train()
        assert not torch.equal(model(IDS)[2], model(IDS)[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_config": object()}, "must be a peft.LoraConfig"),
        ({"peft_config": peft.LoraConfig(use_dora=True)}, "no plain LoRA .*use_dora"),
        ({"peft_config": peft.LoraConfig(target_modules=["lm_head"])}, "output embedding"),
        ({"load_in_8bit": True}, "quantised models"),
        ({"trust_remote_code": True}, "no code of a model's folder is ever run"),
        ({"v_head_init_strategy": "zeros"}, "must be None or 'normal'"),
    ],
)
def test_what_cannot_be_honoured_raises(tiny_policy: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy, **arguments)


def test_pickled_weights_are_not_loaded(model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    torch.save(model.pretrained_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_the_reference_is_a_frozen_copy(model: Any) -> None:
    reference = create_reference_model(model)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.v_head.summary.bias += 1
    assert not torch.equal(reference.v_head.summary.bias, model.v_head.summary.bias)


def test_shared_layers_stay_as_they_are_in_both(model: Any) -> None:
    create_reference_model(model, num_shared_layers=1)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all("embed_tokens" in name or "layers.0." in name for name in frozen)
    assert any("layers.0." in name for name in frozen)
    with pytest.raises(ValueError, match="fewer num_shared_layers"):
        create_reference_model(model, num_shared_layers=9)
