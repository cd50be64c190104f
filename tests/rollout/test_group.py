"""What is asked of the engines before a run begins. Starts none."""

from types import SimpleNamespace
from typing import Any

import pytest

from ppo_ray.config import load_config
from ppo_ray.errors import WorkerError
from ppo_ray.rollout.group import RolloutGroup
from ppo_ray.weights.acks import Agreement

REQUIRED = ["model.path=m", "prompts.path=p", "reward.path=r", "output_dir=o"]


class Engines(RolloutGroup):
    """A group without actors, which serves whatever it is sent."""

    def __init__(self, *options: str) -> None:
        self._config, self._group = load_config(None, [*REQUIRED, *options]), SimpleNamespace(members=[])
        self._weight_metrics, self._sync_metrics = {}, {}

    def load_weights(self, weights: Any) -> float:
        assert weights == "moved"
        return 0.0


@pytest.mark.parametrize(
    ("options", "rounded"),
    [
        ([], False),
        (["rollout.dtype=bfloat16"], True),
        (["model.dtype=bfloat16"], True),  # then it is the learner that rounds
        (["model.dtype=bfloat16", "rollout.dtype=bfloat16"], True),
    ],
)
def test_engines_may_differ_from_the_learner_by_the_rounding_of_either(
    options: list[str], rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppo_ray.rollout.group.Shards", lambda *arguments: None)
    found = [Agreement("rollout-0", to_moved=0.03, to_own=3.0, move=3.0)]
    learner: Any = SimpleNamespace(publish=lambda moved: "moved", compare=lambda generated: found)
    prompts: Any = None
    engines = Engines(*options)
    if rounded:
        assert engines.check_engines(learner, prompts) == found
    else:
        with pytest.raises(WorkerError, match=r"rollout-0 is 3.0e-02 nats per token off.* of another policy"):
            engines.check_engines(learner, prompts)


@pytest.mark.parametrize(("placement", "asked"), [("apart", [False]), ("colocated", [False, False])])
def test_engines_that_sleep_are_checked_after_they_have_dropped_their_weights(
    placement: str, asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's level 2 loses shows in what is generated after the second sync, before the first step."""
    done: list[Any] = []

    class Worker:
        class generate:
            @staticmethod
            def remote(prompts: Any, step: int, seed: int, keep_weights: bool) -> None:
                done.append(keep_weights)

    def shards(group: Any, doing: str, calls: list[Any], *rest: Any, **more: Any) -> Any:
        for call in calls:
            call(Worker, None)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr("ppo_ray.rollout.group.Shards", shards)
    found = [Agreement("rollout-0", to_moved=1e-5, to_own=3.0, move=3.0)]
    learner: Any = SimpleNamespace(publish=lambda moved: "moved", compare=lambda generated: found)
    engines = Engines(f"ray.placement={placement}")
    engines._weight_metrics = {}
    load = engines.load_weights
    monkeypatch.setattr(engines, "load_weights", lambda weights: done.append("load") or load(weights))  # type: ignore[func-returns-value]
    engines.check_engines(learner, SimpleNamespace(split=lambda number: [None]))
    assert done == [step for keep in asked for step in ("load", keep)]
    engines.generate(SimpleNamespace(split=lambda number: [None]), 0, keep_weights=True)  # type: ignore[arg-type]
    assert done[-1] is True
