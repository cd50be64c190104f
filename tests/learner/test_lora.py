"""A learner of adapters: what it trains and keeps, how it goes on, and an engine that ignores them."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_ray import trajectory
from ppo_ray.config import LearnerConfig, LoraConfig, ModelConfig, UpdateConfig
from ppo_ray.errors import InputError, WorkerError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.models.merging import merge_checkpoint
from ppo_ray.rollout.engine import Engine, GenerationRequest, Sampling
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.weights.acks import check_agreements
from ppo_ray.weights.manifest import num_buckets
from ppo_ray.weights.snapshot import WeightSnapshot, Wire
from tests.learning import largest_difference, make_table, weights

OPTIONS = UpdateConfig(learning_rate=1e-2, epochs=2, score_scaling="mean_std")


def load(folder: Path, checkpoint: Path | None = None, **model: Any) -> PPOLearner:
    options = ModelConfig(path=str(folder), **{"lora": LoraConfig(rank=4)} | model)
    return PPOLearner.load(
        options, OPTIONS, LearnerConfig(), temperature=1.0, device="cpu", num_steps=9, checkpoint=checkpoint
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_adapters_and_value_head_learn_and_go_on_bit_for_bit(
    tiny_policy: Path, tmp_path: Path, critic: str, dtype: str
) -> None:
    learner = load(tiny_policy, critic=critic, dtype=dtype)
    stepped = [tensor for group in learner._optimizer.param_groups for tensor in group["params"]]
    adapters = 4 * 2 * (128 + 128 + 2 * (128 + 64) + 128 + 128 + 2 * (128 + 256) + 256 + 128)
    assert sum(tensor.numel() for tensor in stepped) == adapters * (2 if critic == "separate" else 1) + 129
    assert {tensor.dtype for tensor in stepped} == {torch.float32}
    kept = {id(tensor): tensor.numel() for tensor in learner._policy.parameters()}
    base = 512 * 128 + 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128) + 128
    assert sum(kept.values()) == base + sum(tensor.numel() for tensor in stepped)  # the base once, for the critic too
    assert list(learner._reference.parameters()) == []

    assert learner.update(make_table(8), 0).metrics["kl/per_sequence"] == 0.0
    assert learner.update(make_table(7), 1).metrics["kl/per_sequence"] != 0.0
    learner.save(tmp_path / "saved")
    optimizer = load_file(tmp_path / "saved" / "learner" / "optimizer.safetensors")
    assert sum(tensor.numel() for name, tensor in optimizer.items() if "exp_avg:" in name) == sum(
        tensor.numel() for tensor in stepped
    )
    again = load(tiny_policy, tmp_path / "saved", critic=critic, dtype=dtype)
    expected, found = learner.update(make_table(9), 2), again.update(make_table(9), 2)
    assert found.trajectories.equals(expected.trajectories)
    assert largest_difference(weights(learner), weights(again)) == 0
    learner.save(tmp_path / "one")
    again.save(tmp_path / "other")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert not [name for name in files if name.name == "model.safetensors"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_merged_checkpoint_is_a_whole_model_that_a_learner_takes(
    tiny_policy: Path, tmp_path: Path, critic: str
) -> None:
    learner = load(tiny_policy, critic=critic)
    learner.update(make_table(8), 0)
    learner.save(tmp_path / "saved")
    merge_checkpoint(tmp_path / "saved", tmp_path / "merged", base=str(tiny_policy))
    whole = load(tmp_path / "merged", lora=None, critic=critic)
    assert largest_difference(weights(whole), weights(learner)) == 0  # the same sum, rounded in the same way
    values = [one.update(make_table(6), 1).metrics["value/mean"] for one in (whole, learner)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    for folder, words in ((tmp_path / "merged", "it is a whole model already"), (tmp_path / "saved", "exists")):
        with pytest.raises(InputError, match=words):
            merge_checkpoint(folder, tmp_path / "merged", base=str(tiny_policy))


def test_a_checkpoint_on_another_base_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    load(base).save(tmp_path / "saved")
    with pytest.raises(InputError, match="are of another base"):
        load(tiny_policy, tmp_path / "saved")
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    changed.save_pretrained(base)
    with pytest.raises(InputError, match=r"the reference model \(.*\) is not the one that the run began with"):
        load(base, tmp_path / "saved")


def test_the_weights_that_travel_are_the_bases_by_name_and_number(tiny_policy: Path) -> None:
    adapted, plain = load(tiny_policy), load(tiny_policy, lora=None)
    adapted.update(make_table(8), 0)
    ours, theirs = adapted.weights().manifest.entries, plain.weights().manifest.entries
    assert [(entry.name, entry.dtype, entry.shape) for entry in ours] == [
        (entry.name, entry.dtype, entry.shape) for entry in theirs
    ]
    differing = {one.name for one, other in zip(ours, theirs, strict=True) if one.checksum != other.checksum}
    assert differing == {entry.name for entry in theirs if "_proj" in entry.name}
    wire = Wire("bfloat16", 1 << 16)
    sizes = (entry.num_bytes for entry in adapted.weights(wire).manifest.entries)
    assert adapted.num_buckets(wire) == num_buckets(sizes, wire.bucket_bytes) > 1


def generate(engine: Engine) -> pa.Table:
    """Let an engine sample for a few prompts; returns its trajectories."""
    requests = [GenerationRequest((3 + row, 40, 7), 8, row) for row in range(6)]
    rows = make_table(6).to_pylist()
    for row, request, done in zip(rows, requests, engine.generate(requests, Sampling(1.0)), strict=True):
        row |= {"prompt_ids": request.prompt_ids, "response_ids": done.response_ids, "rollout_logprobs": done.logprobs}
    return trajectory.with_scores(trajectory.from_rows(rows), [0.0] * 6)


@pytest.mark.parametrize("alone", [False, True])
def test_an_engine_that_ignores_its_adapters_is_refused(tiny_policy: Path, alone: bool) -> None:
    learner = load(tiny_policy)
    probe = learner.probe()
    before = weights(learner)

    def start() -> HFEngine:
        return HFEngine(str(tiny_policy), lora=LoraConfig(rank=4) if alone else None)

    def take() -> WeightSnapshot:
        named = learner.named_adapters() if alone else learner.named_weights()
        return WeightSnapshot.take(named, learner.policy_version)

    engine = start()
    with probe.move():
        engine.load_weights(take())
    found = probe.compare(generate(engine))
    check_agreements(found, "float32")
    assert found[0].to_moved < 1e-4 and found[0].to_own > 0.05
    assert largest_difference(before, weights(learner)) == 0

    ignoring, unadapted = start(), dict(learner._reference.named_weights())
    if alone:
        unadapted = {name: torch.zeros_like(tensor) for name, tensor in learner.named_adapters()}
    ignoring.load_weights(WeightSnapshot.take(unadapted.items(), learner.policy_version))
    with pytest.raises(WorkerError, match="it still computes with those before"):
        check_agreements(probe.compare(generate(ignoring)), "float32")


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_adapters_that_travel_alone_are_the_policys(tiny_policy: Path, critic: str) -> None:
    """B with its scale, in float32, and nothing of the values."""
    learner = load(tiny_policy, critic=critic, lora=LoraConfig(rank=4, alpha=12), dtype="bfloat16")
    learner.update(make_table(8), 0)
    found, kept = dict(learner.named_adapters()), dict(learner._policy.named_parameters())
    assert len(found) == 2 * 7 * 2 and {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (kept[f"causal_lm.{name}.lora_{part}.default.weight"] for part in "AB")
        assert b.abs().max() > 0
        assert torch.equal(found[f"{name}.lora_A.weight"], a) and torch.equal(found[f"{name}.lora_B.weight"], 3 * b)
    wire = Wire(None, 1 << 12)
    sizes = (tensor.numel() * 4 for tensor in found.values())
    assert learner.num_buckets(wire, adapters_alone=True) == num_buckets(sizes, wire.bucket_bytes) > 1
