"""A learner of adapters on a quantised base: engines and merged models get what its codes stand for."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig
from ppo_ray.errors import InputError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.models.merging import merge_checkpoint
from ppo_ray.models.quantization import linear_maps
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.weights.acks import check_agreements
from ppo_ray.weights.snapshot import WeightSnapshot
from tests.learner.test_lora import OPTIONS, generate
from tests.learning import largest_difference, make_table, weights

pytest.importorskip("bitsandbytes", reason="bitsandbytes is one of the packages for GPUs")


def load(folder: Path, checkpoint: Path | None = None, recompute: bool = False, **model: Any) -> PPOLearner:
    """Load it on the CPU, which options refuse and code does not."""
    options = ModelConfig(path=str(folder), **{"lora": LoraConfig(rank=4), "quantization": "nf4"} | model)
    learner = LearnerConfig(gradient_checkpointing=recompute)
    return PPOLearner.load(options, OPTIONS, learner, temperature=1.0, device="cpu", num_steps=9, checkpoint=checkpoint)


@pytest.mark.parametrize(("critic", "kind", "dtype"), [("separate", "nf4", "bfloat16"), ("shared", "int8", "float32")])
def test_a_run_goes_on_bit_for_bit_and_merges_to_what_engines_got(
    tiny_policy: Path, tmp_path: Path, critic: str, kind: str, dtype: str
) -> None:
    options = {"critic": critic, "quantization": kind, "dtype": dtype}
    learner = load(tiny_policy, **options)
    stepped = [tensor for group in learner._optimizer.param_groups for tensor in group["params"]]
    assert {tensor.dtype for tensor in stepped} == {torch.float32}
    assert learner.update(make_table(8), 0).metrics["kl/per_sequence"] == 0.0  # the reference is quantised too
    assert learner.update(make_table(7), 1).metrics["kl/per_sequence"] != 0.0
    learner.save(tmp_path / "saved")
    again = load(tiny_policy, tmp_path / "saved", **options)
    assert again.update(make_table(9), 2).trajectories.equals(learner.update(make_table(9), 2).trajectories)
    assert largest_difference(weights(learner), weights(again)) == 0

    sent = weights(load(tiny_policy, tmp_path / "saved", **options))
    config = tmp_path / "saved" / "config.yaml"
    config.write_text(f"model: {{path: {tiny_policy}, quantization: {kind}, dtype: {dtype}}}")
    merge_checkpoint(tmp_path / "saved", tmp_path / "merged", dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=getattr(torch, dtype))
    assert largest_difference(sent, dict(merged.named_parameters())) == 0
    merge_checkpoint(tmp_path / "saved", tmp_path / "exact")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32)
    for name, tensor in exact.named_parameters():
        assert torch.equal(tensor.to(sent[name].dtype), sent[name]), name
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    for name in linear_maps(plain):
        assert (
            largest_difference({name: plain.get_submodule(name).weight}, {name: exact.get_submodule(name).weight}) > 0
        )


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_codes_are_in_memory_once_and_an_update_is_the_same_with_layers_computed_again(
    tiny_policy: Path, critic: str
) -> None:
    learner, recomputing = load(tiny_policy, critic=critic), load(tiny_policy, critic=critic, recompute=True)
    codes = {tensor.data_ptr(): tensor.numel() for name, tensor in learner._policy.named_buffers() if "codes" in name}
    assert 2 * sum(codes.values()) == 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert list(learner._reference.parameters()) == []
    for one in (learner, recomputing):
        one.update(make_table(8), 0)
    assert largest_difference(weights(learner), weights(recomputing)) < 1e-6


def test_an_engine_computes_what_the_learner_does(tiny_policy: Path) -> None:
    learner = load(tiny_policy)
    probe, before = learner.probe(), weights(learner)
    engine = HFEngine(str(tiny_policy))
    with probe.move():
        engine.load_weights(WeightSnapshot.take(learner.named_weights(), learner.policy_version))
    found = probe.compare(generate(engine))
    check_agreements(found, "float32")
    assert found[0].to_moved < 1e-4 and found[0].to_own > 0.05
    assert largest_difference(before, weights(learner)) == 0


def test_another_base_or_other_codes_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    load(base).save(tmp_path / "saved")
    refused = r"the reference model \(.*\) is not the one that the run began with"
    with pytest.raises(InputError, match=refused):
        load(base, tmp_path / "saved", quantization="int8")
    with pytest.raises(InputError, match=refused):
        load(base, tmp_path / "saved", quantization=None)
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    changed.save_pretrained(base)
    with pytest.raises(InputError, match=refused):
        load(base, tmp_path / "saved")
