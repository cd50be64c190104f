"""TRL's trainer on a model with adapters: `peft_config`, as TRL 0.11 takes it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

QUERIES = [torch.tensor(ids) for ids in ([5, 6], [7, 8, 9], [10], [11, 12, 13, 14])]
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "pad_token_id": 0}


@pytest.fixture
def trainer(tiny_policy: Path) -> PPOTrainer:
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy, peft_config=lora)
    options = {"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-2}
    return PPOTrainer(PPOConfig(**options), model, None, AutoTokenizer.from_pretrained(tiny_policy))


def step(trainer: PPOTrainer) -> dict[str, Any]:
    responses = trainer.generate(QUERIES, return_prompt=False, **SAMPLING)
    return trainer.step(QUERIES, responses, [torch.tensor(float(len(response))) for response in responses])


def test_adapters_learn_and_the_reference_is_the_model_without_them(trainer: PPOTrainer, tiny_policy: Path) -> None:
    assert trainer.is_peft_model and trainer.ref_model is None
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    assert step(trainer)["objective/kl"] == 0.0
    assert step(trainer)["objective/kl"] != 0.0
    changed = {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {name for name in before if "lora_B" in name or "v_head" in name} <= changed
    assert not [name for name in changed if "lora_" not in name and "v_head" not in name]
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy)
    nearly_greedy = SAMPLING | {"temperature": 1e-4}
    _, reference = trainer.generate(QUERIES, generate_ref_response=True, **nearly_greedy)
    wanted = plain.generate(QUERIES[0][None], do_sample=False, max_new_tokens=6, pad_token_id=0)[0]
    assert reference[0].tolist() == wanted.tolist()


def test_what_was_saved_is_loaded_here_and_by_peft(trainer: PPOTrainer, tiny_policy: Path, tmp_path: Path) -> None:
    step(trainer)
    trainer.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted, _, values = trainer.model(ids)
        found, _, again_values = again(ids)
        assert torch.equal(found, wanted) and torch.equal(again_values, values)
        assert (theirs(ids).logits - wanted).abs().max() < 1e-5


def test_on_ray_they_are_refused(trainer: PPOTrainer) -> None:
    with pytest.raises(ValueError, match="adapters cannot be honoured on Ray: set model.lora"):
        PPOTrainer(trainer.config, trainer.model, None, trainer.tokenizer, on_ray=[])
