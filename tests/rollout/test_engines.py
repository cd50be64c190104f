"""Both engines against plain transformers, and against each other."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_ray.errors import WorkerError, WorkerLost
from ppo_ray.rollout.engine import Engine, GenerationRequest, Sampling
from ppo_ray.rollout.hf import HFEngine
from ppo_ray.rollout.vllm import VLLMEngine
from ppo_ray.weights.snapshot import WeightSnapshot, Wire
from tests.rollout.comparison import REQUESTS, largest_difference, reference

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.0)


@pytest.fixture(params=["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, tiny_policy: Path) -> Iterator[Engine]:
    if request.param == "hf":
        yield HFEngine(str(tiny_policy), max_context=128)
    else:
        engine = request.getfixturevalue("vllm_engine")
        engine.load_weights(snapshot_of(reference(tiny_policy), 0))
        yield engine


def snapshot_of(model: torch.nn.Module, version: int, dtype: str | None = None) -> WeightSnapshot:
    """Return buckets so small that the embedding has one of its own, and that a layer is cut in two by them."""
    snapshot = WeightSnapshot.take(model.named_parameters(), version, Wire(dtype, 200_000))
    assert len(snapshot.buckets) == (9 if dtype is None else 4)
    return snapshot


@torch.inference_mode()
def greedy(model: torch.nn.Module, request: GenerationRequest) -> tuple[int, ...]:
    ids = list(request.prompt_ids)
    for _ in range(request.max_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(request.prompt_ids) :])


def test_greedy_tokens_are_those_of_transformers(engine: Engine, tiny_policy: Path) -> None:
    model = reference(tiny_policy)
    completions = engine.generate(REQUESTS, GREEDY)
    assert [completion.response_ids for completion in completions] == [greedy(model, request) for request in REQUESTS]
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert largest_difference(model, completions) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(engine: Engine, tiny_policy: Path, temperature: float) -> None:
    completions = engine.generate(REQUESTS, Sampling(temperature=temperature))
    assert [len(completion.response_ids) for completion in completions] == [request.max_tokens for request in REQUESTS]
    assert largest_difference(reference(tiny_policy), completions, temperature) < 1e-4


def test_a_request_gives_the_same_response_in_any_batch(engine: Engine) -> None:
    together = engine.generate(REQUESTS, SAMPLED)
    turned = engine.generate(REQUESTS[::-1], SAMPLED)[::-1]
    assert [completion.response_ids for completion in turned] == [completion.response_ids for completion in together]
    for i in (0, 7, 23):
        (alone,) = engine.generate([REQUESTS[i]], SAMPLED)
        assert alone.response_ids == together[i].response_ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-4)
    other_seeds = [replace(request, seed=request.seed + 1000) for request in REQUESTS]
    assert [completion.response_ids for completion in engine.generate(other_seeds, SAMPLED)] != [
        c.response_ids for c in together
    ]


def test_a_stop_token_ends_a_response_and_belongs_to_it(engine: Engine) -> None:
    free = engine.generate(REQUESTS, GREEDY)
    stop = free[5].response_ids[2]
    for unstopped, stopped in zip(free, engine.generate(REQUESTS, Sampling(0.0, (stop,))), strict=True):
        ids = unstopped.response_ids
        expected = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert stopped.response_ids == expected
        assert stopped.finish_reason == ("stop" if stop in ids else "length")


def test_new_weights_are_served_at_once(engine: Engine, tiny_policy: Path) -> None:
    """Also that nothing cached with earlier weights is used: the same prompts were just generated with those."""
    engine.generate(REQUESTS, SAMPLED)
    for version in (5, 6, 7):
        model = reference(tiny_policy, noise=0.05 * version)
        engine.load_weights(snapshot_of(model, version))
        assert engine.policy_version == version
        completions = engine.generate(REQUESTS, SAMPLED)
        assert largest_difference(model, completions) < 1e-4
        assert largest_difference(reference(tiny_policy), completions) > 0.1  # the test can tell


@pytest.mark.slow
def test_packed_copies_of_the_weights_before_are_freed(vllm_engine: VLLMEngine, tiny_policy: Path) -> None:
    """On a CPU vLLM multiplies with them; a function of each layer's holds its copy."""

    def find_packed(worker: Any) -> list[weakref.ref[Any]]:
        layers = worker.weight_transfer_engine.model.modules()
        return [weakref.ref(layer.cpu_linear) for layer in layers if hasattr(layer, "cpu_linear")]

    (packed,) = vllm_engine._llm.collective_rpc(find_packed)
    assert len(packed) > 8 and all(held() for held in packed)
    vllm_engine.load_weights(snapshot_of(reference(tiny_policy), 1))
    assert not any(held() for held in packed)


def test_weights_rounded_on_the_wire_are_served_as_they_arrive(engine: Engine, tiny_policy: Path) -> None:
    model, rounded = reference(tiny_policy, noise=0.1), reference(tiny_policy, noise=0.1)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    engine.load_weights(snapshot_of(model, 8, "bfloat16"))
    completions = engine.generate(REQUESTS, SAMPLED)
    assert largest_difference(rounded, completions) < 1e-4
    assert largest_difference(model, completions) > 1e-3


def test_damaged_weights_are_refused(engine: Engine, tiny_policy: Path) -> None:
    """Nothing was touched yet: the engine goes on with what it has."""
    model = reference(tiny_policy, noise=0.3)
    engine.load_weights(snapshot_of(model, 9))
    snapshot = snapshot_of(reference(tiny_policy), 10)
    damaged = snapshot.buckets[0].copy()
    damaged[1000] ^= 1
    with pytest.raises(WorkerError, match=r"policy version 10 arrived damaged: model.embed_tokens.weight \(checksum"):
        engine.load_weights(replace(snapshot, buckets=(damaged, *snapshot.buckets[1:])))
    assert engine.policy_version == 9
    assert largest_difference(model, engine.generate(REQUESTS, SAMPLED)) < 1e-4


@pytest.mark.slow
def test_both_engines_give_the_same_greedy_responses(vllm_engine: Engine, tiny_policy: Path) -> None:
    vllm_engine.load_weights(snapshot_of(reference(tiny_policy), 1))
    ours = vllm_engine.generate(REQUESTS, GREEDY)
    theirs = HFEngine(str(tiny_policy), max_context=128).generate(REQUESTS, GREEDY)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.response_ids == other.response_ids
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_prompts_that_cannot_be_generated_for(engine: Engine) -> None:
    with pytest.raises(WorkerError, match="token ids"):
        engine.generate([GenerationRequest((3, 600), 4, 0)], SAMPLED)
    with pytest.raises(WorkerError, match="max_context=128"):
        engine.generate([GenerationRequest((3,) * 120, 20, 0)], SAMPLED)


def test_logits_that_are_not_finite_are_refused(engine: Engine, tiny_policy: Path) -> None:
    model = reference(tiny_policy)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = torch.nan
    engine.load_weights(snapshot_of(model, 10))
    for requests, named in ((REQUESTS, "request 0"), ([replace(REQUESTS[3], name="sample 7")], "sample 7")):
        with pytest.raises(WorkerError, match=f"^{named}: the log-probability of its response's token 1 is nan, after"):
            engine.generate(requests, SAMPLED)
    model = reference(tiny_policy)
    engine.load_weights(snapshot_of(model, 11))  # nothing of it is left in a cache
    assert largest_difference(model, engine.generate(REQUESTS, SAMPLED)) < 1e-4


def test_sleep_changes_no_answer(engine: Engine, tiny_policy: Path) -> None:
    """On a CPU an engine sleeps in name alone; who is asked, or gets weights, is awake again."""
    before = engine.generate(REQUESTS, SAMPLED)
    engine.sleep()
    engine.sleep()
    assert engine.generate(REQUESTS, SAMPLED) == before
    engine.sleep()
    model = reference(tiny_policy, noise=0.1)
    engine.load_weights(snapshot_of(model, 11))
    assert largest_difference(model, engine.generate(REQUESTS, SAMPLED)) < 1e-4
    engine.load_weights(snapshot_of(model, 12))
    engine.sleep()
    assert engine.policy_version == 12


@pytest.mark.slow
def test_an_update_brings_back_every_weight_that_a_sleep_has_dropped(
    vllm_engine: Any, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's level 2 leaves garbage in the memory of weights; a CPU's stays, so garbage is written there."""
    vllm_engine.load_weights(snapshot_of(reference(tiny_policy), 20))
    worker = vllm_engine._llm.llm_engine.model_executor.driver_worker
    assert worker.weight_transfer_engine.unwritten == []
    monkeypatch.setattr(vllm_engine._sleep, "_can_drop", True)
    vllm_engine.sleep(keep_weights=False)
    for parameter in worker.get_model().parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(WorkerLost, match="dropped its weights"):
        vllm_engine.generate(REQUESTS, SAMPLED)
    model = reference(tiny_policy, noise=0.1)
    vllm_engine.load_weights(snapshot_of(model, 21))
    assert largest_difference(model, vllm_engine.generate(REQUESTS, SAMPLED)) < 1e-4
