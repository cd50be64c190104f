"""What of ppo_ray's options a trainer over Ray actors takes. Starts nothing."""

from pathlib import Path

import pytest

from ppo_ray.errors import InputError
from ppo_ray.trl import PPOConfig
from ppo_ray.trl.on_ray import _ray_config


def test_options_of_the_actors_are_taken(tmp_path: Path) -> None:
    config = _ray_config(
        PPOConfig(batch_size=6, mini_batch_size=3), str(tmp_path), ["rollout.workers=3", "learner.threads=1"]
    )
    assert (config.rollout.workers, config.learner.threads, config.rollout.batch_size) == (3, 1, 6)


@pytest.mark.parametrize(
    "option", ["ppo.clip_range=0.1", "model.reference_path=elsewhere", "reward.workers=2", "seed=3", "nonsense"]
)
def test_what_is_the_scripts_own_is_refused_not_overwritten(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"on_ray: {option} cannot be set here"):
        _ray_config(PPOConfig(), str(tmp_path), ["rollout.workers=2", option])
