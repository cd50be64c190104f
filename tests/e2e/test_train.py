"""The whole loop on tiny models, with both engines."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.start import PARTS
from ppo_ray import trajectory
from tests.command_line import STEPS, CommandLine, Undisturbed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_run_leaves_what_it_promises(
    ppo_ray: CommandLine, undisturbed: Undisturbed, tiny_policy: Path, engine: str
) -> None:
    run = undisturbed(engine)
    output = (run.parent / "stdout").read_text()
    assert "self-check passed: engines compute the learner's log-probabilities to " in output
    assert f"{STEPS[engine]} steps of 8 responses each, seed 0, into {run}" in output and "\x1b" not in output
    assert f"saving the policy after {STEPS[engine]} steps: checkpoints/step-{STEPS[engine]:05d}" in output
    assert f"ppo-ray train {run / 'config.yaml'} --resume steps={2 * STEPS[engine]}" in output
    assert "step 0 checked" in output
    assert [part for part, pattern in PARTS.items() if not re.search(pattern, output, re.MULTILINE)] == []

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS[engine]))
    assert abs(lines[0]["kl/per_sequence"]) < 1e-6
    assert lines[2]["kl/per_sequence"] != 0
    for line in lines:
        assert line["policy/ratio_first"] == pytest.approx(1, abs=1e-6)
        assert 0 <= line["policy/approx_kl_first"] < 1e-11
        assert line["mismatch/logprob_max"] < 1e-3  # at every step: engines serve the learner's very weights
        assert line["rollout/staleness_max"] == 0
        assert all(line[f"time/{part}_s"] > 0 for part in ("generate", "score", "learn", "sync", "step"))

    for step in range(STEPS[engine]):
        table = pq.read_table(run / "trajectories" / f"step-{step:05d}.parquet")
        assert table.schema.equals(trajectory.LEARNED_SCHEMA)
        assert table.column("sample_id").to_pylist() == list(range(8 * step, 8 * step + 8))
        assert set(table.column("policy_version").to_pylist()) == {step}
        assert table.column("worker").to_pylist() == ["rollout-0"] * 4 + ["rollout-1"] * 4
        assert table.column("score").null_count == 0
        assert [len(a) for a in table.column("advantages").to_pylist()] == trajectory.lengths(
            table, "response_ids"
        ).tolist()

    final = run / "checkpoints" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    before = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert set(load_file(final / "value_head" / "value_head.safetensors")) == {"weight", "bias"}
    assert AutoTokenizer.from_pretrained(final).eos_token_id == 0
    assert (run / "config.yaml").read_text() == (final / "config.yaml").read_text()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "policy/approx_kl" in (run / "report.html").read_text()
    assert f"ppo-ray view {run}" in output
    assert len(re.findall(r"^\|", (run / "samples.md").read_text(), re.M)) >= 4
    assert list((run / "tensorboard").glob("events.*"))

    result = ppo_ray.run("evaluate", str(final))
    assert result.returncode == 0, result.stderr
    after = re.search(r"held-out.*?->\s*([-+]?\d+\.\d+)", output)
    assert after, output
    assert after.group(1) in result.stdout
    assert ppo_ray.leftovers() == []


SCORES = """
import pathlib
run = pathlib.Path({run!r}, "trajectories")
def score(prompts, responses):
    if (run / "step-00001.parquet").exists():
        return [3e38 * (-1) ** i for i in range(len(responses))]
    if (run / "step-00000.parquet").exists():
        return [None] * len(responses)
    return [None if i == 0 else float(len(r)) for i, r in enumerate(responses)]
"""


def test_scores_that_are_missing_and_a_loss_that_is_not_finite(ppo_ray: CommandLine, tmp_path: Path) -> None:
    """Some texts of the first step have no score, none of the second; the third's end the run, and are kept."""
    run = tmp_path / "run"
    (tmp_path / "own_reward.py").write_text(SCORES.format(run=str(run)))
    in_its_folder = replace(ppo_ray, prefix=("env", f"--chdir={tmp_path}"))
    options = ("reward.path=null", "reward.function=own_reward:score", "ppo.value_clip_range=null")
    result = in_its_folder.train("rollout.engine=hf", *options)
    assert result.returncode == 1, result.stderr
    some, none = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:2]
    table = pq.read_table(run / "trajectories" / "step-00000.parquet")
    assert table.column("score").null_count == 2  # the first of each worker's shard
    assert table.column("advantages").null_count == 2
    assert some["score/num_unscored"] == 2
    assert some["score/mean"] > 0
    assert none["score/num_unscored"] == 8
    assert none["learner/skipped_update"] == 1
    dump = run / "trajectories" / "step-00002-nonfinite.parquet"
    assert str(dump) in result.stderr and "learner: at step 2, epoch 0 the loss is" in result.stderr
    assert {abs(score) > 1e38 for score in pq.read_table(dump).column("score").to_pylist()} == {True}
    assert ppo_ray.leftovers() == []


def test_a_separate_critic_and_every_other_option_go_through(ppo_ray: CommandLine, tmp_path: Path) -> None:
    options = {
        "learning_rate_schedule": "cosine",
        "warmup_steps": 1,
        "value_warmup_steps": 1,
        "loss_aggregation": "sequence_mean",
        "clip_range_high": 0.28,
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
        "importance_cap": 2.0,
        "entropy_coef": 0.01,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "score_scaling": "mean_std",
        "score_clip": 3.0,
        "missing_eos_penalty": 0.5,
        "reward_clip": 5.0,
        "max_grad_norm": 1.0,
        "early_stopping": "before_step",
    }
    given = [f"ppo.{name}={value}" for name, value in options.items()]
    result = ppo_ray.train("rollout.engine=hf", "rollout.workers=1", "model.critic=separate", *given)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learner/learning_rate"] for line in lines] == pytest.approx([1e-3, 1e-3, 0.5e-3])
    assert lines[0]["policy/ratio_max"] == 1 and lines[2]["policy/ratio_max"] > 1
    assert all(0.99 < line["mismatch/importance_mean"] < 1.01 for line in lines)
    final = tmp_path / "run" / "checkpoints" / "final"
    assert (final / "critic" / "model.safetensors").is_file()
    assert ppo_ray.run("evaluate", str(final)).returncode == 0
