"""The plan's learner on a GPU, held to the memory that its own code takes; see `tests/traced_memory.py`."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.plan import ModelSizes
from ppo_ray.plan.learner import learner_terms
from tests.plan.test_gpu_configs import CONFIGS, SHAPES, llama, place_models
from tests.traced_memory import trace_update

NOT_TRACED = ("CUDA", "a bucket of weights (ipc)", "a bucket of weights (nccl)")
QWEN, LLAMA = "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
WIDE = llama(3, 256, 1024, 4, 2, 512)
"""A model whose layers are at their work when the pass takes most."""


def plan_over_trace(config: Config, shape: Any) -> float:
    """Return the planned memory over the traced one, where prompts are short: then most tokens have probabilities."""
    planned = [term for term in learner_terms(config, ModelSizes.read(config), 0) if term.device == "gpu"]
    traced = trace_update(config, {"policy": shape, "critic": shape}, (1, config.rollout.max_response_tokens))
    return sum(term.num_bytes for term in planned if term.what not in NOT_TRACED) / traced.peak


def configured(name: str, tmp_path: Path, shape: Any, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", [*place_models(name, tmp_path, shape), *overrides])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path"),
    [("qwen2.5_1.5b_1x", QWEN), ("llama3.1_8b_8x", LLAMA), ("qwen2.5_32b_2x8", "Qwen/Qwen2.5-32B-Instruct")],
)
def test_the_plan_of_a_config_is_within_a_tenth_of_its_trace(name: str, path: str, tmp_path: Path) -> None:
    config = configured(name, tmp_path, SHAPES[path])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:  # vLLM's tests leave ranks in this one
        assert 0.97 < own.submit(plan_over_trace, config, SHAPES[path]).result(timeout=800) < 1.1


@pytest.mark.parametrize("recomputed", ["true", "false"])
@pytest.mark.parametrize(
    ("kind", "dtype", "critic"),
    [
        ("llama", "bfloat16", "shared"),
        ("llama", "float32", "shared"),
        ("llama", "bfloat16", "separate"),
        ("qwen3", "bfloat16", "shared"),
        ("gemma3_text", "bfloat16", "shared"),
        ("gemma3_text", "float32", "shared"),
    ],
)
def test_the_layers_of_a_pass_are_planned(kind: str, dtype: str, critic: str, recomputed: str, tmp_path: Path) -> None:
    """Of models that keep little for the backward pass, and of one with four norms per layer and two of its heads."""
    shape = WIDE | {"model_type": kind, "head_dim": 64}
    options = (
        f"model.dtype={dtype}",
        f"learner.gradient_checkpointing={recomputed}",
        f"model.critic={critic}",
        "rollout.max_response_tokens=64",
        "prompts.max_tokens=64",
    )
    config = configured("qwen2.5_1.5b_1x", tmp_path, shape, *options, "learner.microbatch_tokens=2048")
    assert 0.97 < plan_over_trace(config, shape) < 1.06


def test_what_is_put_away_is_planned(tmp_path: Path) -> None:
    """Of a model that is large beside its passes: at rest only what is always there, at work no reference."""
    options = ("rollout.max_response_tokens=8", "prompts.max_tokens=8", "learner.microbatch_tokens=32")
    config = configured("qwen2.5_1.5b_1x", tmp_path, WIDE, *options, "learner.offload=[optimizer, reference]")
    kept = [term for term in learner_terms(config, ModelSizes.read(config), 0) if term.device == "gpu"]
    planned = sum(term.num_bytes for term in kept if term.what not in NOT_TRACED)
    always = sum(term.num_bytes for term in kept if term.what not in NOT_TRACED and term.when == "always")
    traced = trace_update(config, {"policy": WIDE, "critic": WIDE}, (1, 8))
    assert 0.9 < planned / traced.peak < 1.1
    assert 0.97 < always / traced.at_rest < 1.03
