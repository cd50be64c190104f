"""Engines that are sent adapters alone, against peft's model: what they compute, and what they refuse."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_ray.config import LoraConfig, ModelConfig
from ppo_ray.errors import WorkerError
from ppo_ray.models.adapter_files import make_adapter_config, read_adapter_shapes
from ppo_ray.models.lora import adapter_layers, add_adapters, matrices, scale_adapters
from ppo_ray.rollout.engine import Engine, Sampling
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.weights.acks import check_agreements
from ppo_ray.weights.snapshot import WeightSnapshot, Wire
from tests.learner.test_lora import generate
from tests.learner.test_lora import load as load_learner
from tests.rollout.comparison import REQUESTS, largest_difference, reference, start_beside_others

LORA = LoraConfig(rank=5, alpha=7)
"""A rank that vLLM must round up, and a scale that is no power of two."""
SAMPLED = Sampling(temperature=1.0)


@pytest.fixture(params=["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, tiny_policy: Path) -> Iterator[Engine]:
    if request.param == "hf":
        yield HFEngine(str(tiny_policy), max_context=128, lora=LORA)
    else:
        yield request.getfixturevalue("adapted_vllm")


@pytest.fixture(scope="module")
def adapted_vllm(tiny_policy: Path, vllm_engine: Engine) -> Any:
    """Return an engine beside the one of whole weights, which has set the environment."""
    return start_vllm(tiny_policy, LORA)


def start_vllm(folder: Path, lora: LoraConfig) -> Any:
    return start_beside_others(folder, adapters=read_adapter_shapes(ModelConfig(path=str(folder), lora=lora)))


def adapted(folder: Path, seed: int, lora: LoraConfig = LORA) -> Any:
    """Return the model of a folder with adapters that change it much."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    add_adapters(model, make_adapter_config(lora, str(folder)), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            matrices(layer)[1].normal_(std=0.2)
    return model


def snapshot_of(model: Any, version: int) -> WeightSnapshot:
    """Return buckets so small that A and B of a map lie in different ones."""
    snapshot = WeightSnapshot.take(scale_adapters(model), version, Wire(None, 5_000))
    assert len(snapshot.buckets) > 10
    return snapshot


def test_new_adapters_are_served_at_once(engine: Engine, tiny_policy: Path) -> None:
    """Also that nothing cached with earlier ones is used: the same prompts were just generated with those."""
    base = reference(tiny_policy)
    if engine.policy_version < 0:
        assert largest_difference(base, engine.generate(REQUESTS, SAMPLED)) < 1e-4
    for version in (5, 6, 7):
        model = adapted(tiny_policy, version)
        engine.load_weights(snapshot_of(model, version))
        assert engine.policy_version == version
        completions = engine.generate(REQUESTS, SAMPLED)
        assert largest_difference(model, completions) < 1e-4
        assert largest_difference(base, completions) > 0.5  # the test can tell


def test_adapters_of_zeros_are_the_model_itself(engine: Engine, tiny_policy: Path) -> None:
    model = adapted(tiny_policy, 1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            matrices(layer)[1].zero_()
    engine.load_weights(snapshot_of(adapted(tiny_policy, 2), 1))
    engine.load_weights(snapshot_of(model, 2))
    assert largest_difference(reference(tiny_policy), engine.generate(REQUESTS, SAMPLED)) < 1e-4


def test_damaged_adapters_and_those_of_another_model_are_refused(engine: Engine, tiny_policy: Path) -> None:
    """Nothing was touched yet: the engine goes on with what it has."""
    model = adapted(tiny_policy, 3)
    engine.load_weights(snapshot_of(model, 3))
    snapshot = snapshot_of(adapted(tiny_policy, 4), 4)
    damaged = snapshot.buckets[0].copy()
    damaged[100] ^= 1
    first = snapshot.manifest.entries[0].name
    with pytest.raises(WorkerError, match=rf"policy version 4 arrived damaged: {first} \(checksum"):
        engine.load_weights(replace(snapshot, buckets=(damaged, *snapshot.buckets[1:])))
    assert engine.policy_version == 3
    others = WeightSnapshot.take(reference(tiny_policy).named_parameters(), 4)
    with pytest.raises(WorkerError, match="of another model"):
        engine.load_weights(others)
    assert largest_difference(model, engine.generate(REQUESTS, SAMPLED)) < 1e-4


@pytest.mark.slow
def test_an_engine_on_vllm_that_ignores_its_adapters_is_refused(
    adapted_vllm: Engine, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `rollout.self_check` and `ppo-ray check` do; see `tests/learner/test_lora.py` for the other engine."""
    from ppo_ray.rollout.vllm_adapters import AdapterModel

    learner = load_learner(tiny_policy, lora=LORA)
    probe = learner.probe()
    with probe.move():
        adapted_vllm.load_weights(WeightSnapshot.take(learner.named_adapters(), 20))
    check_agreements(probe.compare(generate(adapted_vllm)), "float32")
    serve = AdapterModel.serve

    def serve_nothing(self: AdapterModel) -> None:
        self._held = {name: torch.zeros_like(tensor) for name, tensor in self._held.items()}
        serve(self)

    monkeypatch.setattr(AdapterModel, "serve", serve_nothing)
    with probe.move():
        adapted_vllm.load_weights(WeightSnapshot.take(learner.named_adapters(), 21))
    with pytest.raises(WorkerError, match="it still computes with those before"):
        check_agreements(probe.compare(generate(adapted_vllm)), "float32")


@pytest.mark.slow
def test_a_part_of_the_maps(tiny_policy: Path, vllm_engine: Engine) -> None:
    """vLLM packs q, k and v into one map, and gate and up: of some of these only one has adapters."""
    lora = LoraConfig(rank=8, targets=["q_proj", "down_proj", "layers.1.mlp.up_proj"])
    engine, model = start_vllm(tiny_policy, lora), adapted(tiny_policy, 1, lora)
    snapshot = WeightSnapshot.take(scale_adapters(model), 1)
    assert len(snapshot.manifest.entries) == 2 * (2 + 2 + 1)
    engine.load_weights(snapshot)
    assert largest_difference(model, engine.generate(REQUESTS, SAMPLED)) < 1e-4
    engine._llm.collective_rpc("remove_lora", args=(1,))
    with pytest.raises(Exception, match="in memory"):  # never the frozen model without a word
        engine.generate(REQUESTS, SAMPLED)
