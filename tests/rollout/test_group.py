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
