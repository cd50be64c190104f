from pathlib import Path

import pytest

from ppo_ray.config import load_config
from ppo_ray.preflight import cpu_demand
from ppo_ray.run.resume import differences

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert {"imdb.yaml", "imdb_gpt2.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_writes_into_runs(path):
    config = load_config(path, [])
    assert config.output_dir == f"runs/{path.stem}"


def test_the_demo_uses_two_cores_in_every_phase():
    config = load_config(next(path for path in CONFIGS if path.name == "imdb.yaml"), [])
    assert config.rollout.workers * config.rollout.threads == 2
    assert config.reward.workers * config.reward.threads == 2
    assert config.learner.threads == 2


def test_the_notebooks_lengths_are_half_open():
    config = load_config(next(path for path in CONFIGS if path.name == "imdb_gpt2.yaml"), [])
    assert (config.prompts.min_tokens, config.prompts.max_tokens) == (2, 7)
    assert (config.rollout.min_response_tokens, config.rollout.max_response_tokens) == (4, 15)


def test_the_demo_with_overlap_is_the_same_task_on_the_same_cores():
    demo, overlap = (
        load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml", []) for name in ("imdb", "imdb_overlap")
    )
    assert cpu_demand(demo) == cpu_demand(overlap) == 2
    assert [difference.key for difference in differences(demo, overlap)] == [
        "output_dir",
        "rollout.threads",
        "rollout.max_staleness",
        "reward.threads",
        "ppo.importance_cap",
        "learner.threads",
    ]
