from pathlib import Path

import pytest

from ppo_ray.config import Config, load_config


@pytest.fixture
def config(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path) -> Config:
    """Of three steps of four samples with tiny models."""
    models = [f"model.path={tiny_policy}", f"prompts.path={tiny_prompts}", f"reward.path={tiny_classifier}"]
    more = ["prompts.min_chars=20", "rollout.batch_size=4", "steps=3", "seed=5", "evaluation.num_prompts=0"]
    more += ["rollout.max_context=256", "prompts.min_tokens=2", "prompts.max_tokens=8"]
    more += ["rollout.min_response_tokens=4", "rollout.max_response_tokens=16"]
    return load_config(None, ["output_dir=unused", *models, *more])
