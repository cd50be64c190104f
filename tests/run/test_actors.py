"""What is asked of the actors before a run begins. Starts none."""

from types import SimpleNamespace
from typing import Any

import pytest

from ppo_ray.config import load_config
from ppo_ray.errors import WorkerError
from ppo_ray.learner.reports import Agreement
from ppo_ray.run.actors import check_engines

REQUIRED = ["model.path=m", "prompts.path=p", "reward.path=r", "output_dir=o"]


@pytest.mark.parametrize(
    ("options", "rounded"),
    [
        ([], False),
        (["rollout.dtype=bfloat16"], True),
        (["model.dtype=bfloat16"], True),  # then it is the learner that rounds
        (["model.dtype=bfloat16", "rollout.dtype=bfloat16"], True),
    ],
)
def test_engines_may_differ_from_the_learner_by_the_rounding_of_either(options: list[str], rounded: bool) -> None:
    found = [Agreement("rollout-0", to_moved=0.03, to_own=3.0, move=3.0)]
    rollout = SimpleNamespace(load_weights=lambda weights: None, generate_everywhere=lambda prompts, seed: None)
    learner = SimpleNamespace(publish=lambda moved: None, compare=lambda generated: found)
    actors: Any = SimpleNamespace(rollout=rollout, learner=learner)
    prompts: Any = None
    config = load_config(None, [*REQUIRED, *options])
    if rounded:
        assert check_engines(actors, config, prompts) == found
    else:
        with pytest.raises(WorkerError, match="rollout-0 is 3.0e-02 nats a token off"):
            check_engines(actors, config, prompts)
