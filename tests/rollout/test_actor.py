"""When a rollout worker lets its engine sleep; the worker without Ray around it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ppo_ray.config import load_config
from ppo_ray.prompts.stream import PromptBatch
from ppo_ray.rollout import actor
from ppo_ray.rollout.actor import RolloutWorker
from ppo_ray.rollout.engine import Completion, GenerationRequest, Sampling
from ppo_ray.weights.manifest import WeightManifest
from ppo_ray.weights.snapshot import WeightSnapshot


class Recorder:
    """An engine that writes down what it is asked."""

    policy_version = 3

    def __init__(self) -> None:
        self.calls: list[str] = []

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        self.calls.append("generate")
        return [Completion((5,), (-1.0,), "length") for _ in requests]

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        self.calls.append("load_weights")

    def sleep(self) -> None:
        self.calls.append("sleep")


@pytest.mark.parametrize(
    ("placement", "calls"),
    [
        ("apart", ["generate", "load_weights", "generate"]),
        ("colocated", ["sleep", "generate", "sleep", "load_weights", "generate", "sleep"]),
    ],
)
def test_an_engine_sleeps_when_its_turn_is_over(
    placement: str, calls: list[str], tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recorder()
    monkeypatch.setattr(actor, "_start_engine", lambda config: engine)
    base = ["output_dir=x", f"model.path={tiny_policy}", "prompts.path=p", "reward.path=r"]
    worker = RolloutWorker.__ray_metadata__.modified_class("rollout-0")
    worker.setup(load_config(None, [*base, f"ray.placement={placement}"]))
    prompts = PromptBatch((0, 1), ((7, 8), (9,)))
    table, _ = worker.generate(prompts, 0, 0)
    worker.load_weights(WeightManifest(3, "xxh3", ()), [])
    worker.generate(prompts, 0, 0)
    assert table.num_rows == 2
    assert engine.calls == calls
