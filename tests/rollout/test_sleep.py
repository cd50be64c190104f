"""What a vLLM engine keeps of its weights while others have its GPU, on a CPU."""

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppo_ray.errors import WorkerLost
from ppo_ray.rollout.vllm_sleep import Sleep, find_strays, find_unwritten, let_others_grow


class LLM:
    """What stands for `vllm.LLM`: writes down what it is asked."""

    def __init__(self, lost: list[list[str]]) -> None:
        self.lost, self.calls = lost, []  # type: ignore[var-annotated]

    def collective_rpc(self, method: str) -> Any:
        self.calls.append(method)
        return self.lost

    def sleep(self, level: int) -> None:
        self.calls.append(level)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append("+".join(tags))

    def done(self) -> list[Any]:
        calls, self.calls = self.calls, []
        return calls


def update(sleep: Sleep) -> None:
    sleep.wake("weights")
    sleep.end_update()
    sleep.wake("kv_cache")


def test_weights_are_dropped_once_an_update_has_shown_that_it_brings_all_of_them() -> None:
    llm = LLM([[], []])
    sleep = Sleep(llm, frees_memory=True)
    sleep.begin(keep_weights=False)  # nothing is known yet
    sleep.begin(keep_weights=False)
    assert llm.done() == ["let_others_grow", 1]
    sleep.check_weights()
    update(sleep)
    assert llm.done() == ["weights", "find_lost", "kv_cache"]
    sleep.begin(keep_weights=False)
    with pytest.raises(WorkerLost, match="dropped its weights when it had generated, and is asked again before others"):
        sleep.check_weights()
    update(sleep)
    sleep.check_weights()
    assert llm.done() == [2, "weights", "kv_cache"]
    sleep.begin(keep_weights=True)
    sleep.check_weights()
    sleep.wake("weights", "kv_cache")
    assert llm.done() == [1, "weights+kv_cache"]


@pytest.mark.parametrize(("lost", "on_gpu"), [([[], ["a tensor of shape [8]"]], True), ([[]], False)])
def test_weights_are_kept_where_level_2_would_lose_something_or_free_nothing(
    lost: list[list[str]], on_gpu: bool, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(lost)
    sleep = Sleep(llm, frees_memory=on_gpu)
    for _ in range(3):
        sleep.begin(keep_weights=False)
        sleep.check_weights()
        update(sleep)
    levels = [call for call in llm.done() if isinstance(call, int)]
    assert levels == [1, 1, 1]
    warned = [record.getMessage() for record in caplog.records]
    assert warned == (
        ["a sleeping engine keeps its weights on the host, for level 2 loses a tensor of shape [8]"] * on_gpu
    )


def test_tensors_among_the_weights_that_vllm_does_not_save_are_found() -> None:
    """As ALiBi's slopes, an attribute of the attention: they are made when the weights are loaded."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))
            self.register_buffer("scale", torch.ones(3), persistent=False)
            self.view = self.weight.data[1:]
            self.slopes = torch.ones(7)

    model, other = Attention(), torch.ones(9)
    lie_among = [model.weight, model.scale, model.slopes]
    spans = [(place, place + 1) for place in (tensor.data_ptr() for tensor in lie_among)]  # type: ignore[union-attr]
    assert list(find_strays(model, spans)) == ["a tensor of shape [7]"]
    assert list(find_strays(model, [])) == []
    del model.slopes
    assert list(find_strays(model, spans[:2])) == [] and other.numel() == 9


def grown(level: int) -> None:
    raise AssertionError("Memory usage increased after sleeping.")


def test_an_engine_sleeps_although_others_on_its_gpu_grow(caplog: pytest.LogCaptureFixture) -> None:
    slept = []
    let_others_grow(lambda level: slept.append(level), lambda: "RUNNING")(level=2)
    assert slept == [2] and not caplog.records
    let_others_grow(grown, lambda: "SUSPENDED")(level=1)
    assert "the engine sleeps, but others on its GPU took more memory" in caplog.text


def test_an_engine_that_does_not_sleep_is_lost_and_other_assertions_stay() -> None:
    with pytest.raises(WorkerLost, match="did not give its memory back: Memory usage increased after sleeping"):
        let_others_grow(grown, lambda: "RUNNING")(level=1)

    def other(level: int) -> None:
        raise AssertionError("offload_tags")

    with pytest.raises(AssertionError, match="offload_tags"):
        let_others_grow(other, lambda: "SUSPENDED")(level=1)


@pytest.mark.slow
def test_what_vllm_says_of_others_that_grow_is_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's own code, with less free memory after the sleep than before."""
    from vllm.v1.worker.gpu_worker import Worker

    from ppo_ray.rollout.vllm_receiver import WorkerExtension

    free = itertools.count(1000, -100)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (next(free), 2000))
    suspended: list[int] = []
    worker: Any = SimpleNamespace(
        sleep_mode_backend=SimpleNamespace(suspend=suspended.append, state=lambda: "SUSPENDED"),
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(enable_nccl_comm_suspend=False)),
    )
    worker.sleep = lambda level: Worker.sleep(worker, level)
    with pytest.raises(AssertionError):
        worker.sleep(1)
    WorkerExtension.let_others_grow(worker)
    with caplog.at_level(logging.WARNING):
        worker.sleep(level=1)
    assert suspended == [1, 1] and "took more memory" in caplog.text


@pytest.mark.slow
def test_parameters_that_an_update_does_not_bring_are_named() -> None:
    """By vLLM's own record of its reload, of a model whose head is its embedding."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = torch.nn.Embedding(5, 3), torch.nn.LayerNorm(3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    model = Model()
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    weight = model.embedding.weight
    weight.weight_loader(weight, torch.ones(5, 3))  # type: ignore[operator]
    assert find_unwritten(model) == ["norm.weight", "norm.bias"]
