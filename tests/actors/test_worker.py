"""What an actor tells of the memory that it takes."""

import sys
from types import SimpleNamespace

import pytest

from ppo_ray.actors.worker import Worker


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("PPO_RAY_FOLDER", raising=False)
    return Worker("rollout-3")


def test_resident_memory_is_in_gib_and_falls_again(worker: Worker) -> None:
    before = worker.measure_memory()
    assert before.keys() == {"memory/rollout_gib", "memory/rollout_peak_gib"}  # without torch there is no GPU
    held = bytearray(b"x" * (512 << 20))
    during = worker.measure_memory()
    del held
    after = worker.measure_memory()
    assert during["memory/rollout_gib"] - before["memory/rollout_gib"] == pytest.approx(0.5, abs=0.1)
    assert after["memory/rollout_gib"] < during["memory/rollout_gib"] - 0.4
    assert after["memory/rollout_peak_gib"] >= during["memory/rollout_gib"]


def test_memory_of_gpus_is_the_most_since_the_last_call(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, begun = {0: [3 << 30, 4 << 30], 1: [1 << 29, 1 << 30]}, []
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_allocated=lambda gpu: peaks[gpu][0],
        max_memory_reserved=lambda gpu: peaks[gpu][1],
        reset_peak_memory_stats=begun.append,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    found = worker.measure_memory()
    assert (found["memory/rollout_gpu_gib"], found["memory/rollout_gpu_reserved_gib"]) == (3.5, 5.0)
    assert begun == [0, 1]
    cuda.is_initialized = lambda: False  # torch is there, and uses no GPU
    assert "memory/rollout_gpu_gib" not in worker.measure_memory()
