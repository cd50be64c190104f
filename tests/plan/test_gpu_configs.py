"""The configs for GPUs fit the machines that they name, by the shapes of their models."""

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_ray.config import load_config
from ppo_ray.plan import ClusterShape, ModelSizes, make_plan
from ppo_ray.plan.cluster import GIB

CONFIGS = Path(__file__).parents[2] / "configs" / "gpu"


def llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> Any:
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    return {"model_type": "qwen2", "tie_word_embeddings": False, **shape, **more}


LLAMA_8B = llama(32, 4096, 14336, 32, 8, 128256, model_type="llama")
SHAPES = {
    "lvwerra/gpt2-imdb": {"model_type": "gpt2"},
    "lvwerra/distilbert-imdb": {"model_type": "distilbert"},
    "Qwen/Qwen2.5-1.5B-Instruct": llama(28, 1536, 8960, 12, 2, 151936, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "Skywork/Skywork-Reward-Llama-3.1-8B": LLAMA_8B | {"num_labels": 1},
    "Qwen/Qwen2.5-32B-Instruct": llama(64, 5120, 27648, 40, 8, 152064),
}
MACHINES = {
    "gpt2_1x": ClusterShape.uniform(1, 8, 1, 32 * GIB, 16 * GIB),
    "qwen2.5_1.5b_1x": ClusterShape.uniform(1, 16, 1, 128 * GIB, 79 * GIB),
    "llama3.1_8b_8x": ClusterShape.uniform(1, 96, 8, 1000 * GIB, 79 * GIB),
    "qwen2.5_32b_2x8": ClusterShape.uniform(2, 96, 8, 1000 * GIB, 79 * GIB),
}


def test_every_config_has_a_machine() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MACHINES)


def place_models(name: str, folder: Path, policy: Any = None) -> list[str]:
    """Write the shapes of a config's models into folders; returns the options that name them.

    Args:
        name: of the config.
        folder: where to put them.
        policy: another shape of the policy; None: its own.
    """
    config = load_config(CONFIGS / f"{name}.yaml", [])
    overrides = []
    for key, path in (("model.path", config.model.path), ("reward.path", config.reward.path)):
        if path is not None:
            (folder / key).mkdir()
            shape = policy if policy and key == "model.path" else SHAPES[path]
            (folder / key / "config.json").write_text(json.dumps(shape), encoding="utf-8")
            overrides.append(f"{key}={folder / key}")
    return overrides


@pytest.mark.parametrize("name", MACHINES)
def test_a_config_fits_its_machine_and_generation_does_not_wait(name: str, tmp_path: Path) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", place_models(name, tmp_path))
    sizes = ModelSizes.read(config)
    plan = make_plan(config, MACHINES[name], sizes)
    assert config.ray.start_timeout_s >= 300 + 30 * (
        sizes.policy.parameters // 10**9
    )  # loading, compiling, capturing graphs
    assert plan.shortages == () and plan.warnings == ()
    assert config.ppo.log_ratio_clamp is not None and config.model.dtype == "bfloat16"
