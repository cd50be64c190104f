"""Runs that train adapters: what engines compute, what checkpoints hold, how a run goes on, what is made of its end."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import ADAPTED, STEPS, CommandLine, Undisturbed, lines

pytestmark = pytest.mark.slow


def test_engines_compute_with_the_adapters_of_every_step(undisturbed: Undisturbed) -> None:
    """They are sent nothing else; `merged` differs from a run without adapters in what the learner sends alone."""
    run = undisturbed("vllm", 3, *ADAPTED)
    assert "self-check passed" in (run.parent / "stdout").read_text()
    steps = lines(run)
    assert steps[0]["kl/per_sequence"] == 0.0  # exactly: the same forward pass, without adapters
    assert steps[-1]["kl/per_sequence"] > 1e-3
    assert max(step["mismatch/logprob_max"] for step in steps) < 1e-4


def test_the_end_of_a_run_with_adapters(
    ppo_ray: CommandLine, undisturbed: Undisturbed, tiny_policy: Path, tmp_path: Path
) -> None:
    """`tests/faults/test_kills.py` shows that kills, and going on, change nothing of it."""
    whole = undisturbed("hf", STEPS["adapted"], *ADAPTED)
    final = whole / "checkpoints" / "final"
    assert not (final / "model.safetensors").exists()

    result = ppo_ray.run("merge", str(final), str(tmp_path / "merged"))
    assert result.returncode == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), final)
    ids = torch.arange(1, 40)[None]
    assert (merged(ids).logits - adapted(ids).logits).abs().max() < 1e-4
    assert set(load_file(tmp_path / "merged" / "value_head" / "value_head.safetensors")) == {"weight", "bias"}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 0

    evaluated = ppo_ray.run("evaluate", str(final), "--json")  # engines begin with base and adapters, merged
    assert evaluated.returncode == 0, evaluated.stderr
    at_the_end = json.loads((whole / "evaluation_after.json").read_text())
    assert json.loads(evaluated.stdout)["samples"] == at_the_end["samples"]
