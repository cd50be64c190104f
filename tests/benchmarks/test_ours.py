"""What ppo_ray's own run says, read by phase."""

import json
from pathlib import Path

from benchmarks.compare import machine
from benchmarks.compare.ours import read_steps, run_config
from benchmarks.compare.settings import Settings
from benchmarks.flops import DecoderShape
from ppo_ray import trajectory
from ppo_ray.config import UpdateConfig
from ppo_ray.learner.actor import write_trajectories

METRICS = {
    "time/generate_s": 4.0,
    "time/score_s": 0.25,
    "time/old_s": 1.0,
    "time/estimate_s": 0.125,
    "time/update_s": 2.0,
    "time/learn_s": 3.5,
    "time/publish_s": 0.25,
    "time/sync_s": 0.25,
    "time/step_s": 8.0,
    "score/mean": 0.5,
    "kl/per_sequence": 0.1,
    "mismatch/kl": 1e-9,
    "loss/policy": -0.01,
    "loss/value": 0.3,
}


def test_the_seconds_of_a_step_by_phase(tmp_path: Path) -> None:
    row = {
        **{"step": 0, "policy_version": 0, "worker": "rollout-0", "seed": 1, "prompt": "a", "response": "b"},
        "finish_reason": "length",
    }
    lengths = [(2, 3), (4, 1)]
    rows = [
        {**row, "sample_id": index, "prompt_ids": [1] * p, "response_ids": [2] * r, "rollout_logprobs": [-1.0] * r}
        for index, (p, r) in enumerate(lengths)
    ]
    write_trajectories(tmp_path / "trajectories/step-00000.parquet", trajectory.from_rows(rows))
    lines = [{"event": "started", "step": 0}, {"step": 0, **METRICS}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (step,) = read_steps(tmp_path)
    assert step.lengths == lengths
    assert step.phases == {
        **{"generation": 4.0, "scoring": 0.25, "forward": 1.0, "update": 2.0, "sync": 0.5},
        "other": 0.25,  # of 8 s; the learner's own call is no phase, for it has three of them in it
    }
    assert step.figures == {"score": 0.5, "kl": 0.1, "policy_loss": -0.01, "value_loss": 0.3}
    assert step.mismatch == 1e-9


def settings(shape: str) -> Settings:
    return Settings(shape, 8, 2, 1, 0, 1, ["ppo-ray"], ["learner.microbatch_tokens=99"], "")


def test_the_run_is_the_demo_at_the_notebooks_lengths_and_algorithm(tmp_path: Path) -> None:
    config = run_config(settings("notebook"), 4, tmp_path)
    assert (config.seed, config.steps, config.rollout.batch_size, config.learner.microbatch_tokens) == (4, 2, 8, 99)
    assert (config.prompts.min_tokens, config.prompts.max_tokens) == (2, 7)
    assert (config.rollout.min_response_tokens, config.rollout.max_response_tokens) == (4, 15)
    assert config.ppo == UpdateConfig(learning_rate=1.41e-5) and config.model.value_head_init == "random"
    assert (config.ppo.epochs, config.ppo.minibatch_size) == (4, None)
    assert (config.rollout.workers, config.rollout.threads, config.reward.threads, config.learner.threads) == (1,) * 4


def test_another_shape_and_another_type_change_these_alone(tmp_path: Path) -> None:
    notebook, chat = (run_config(settings(shape), 4, tmp_path) for shape in ("notebook", "chat"))
    assert (chat.prompts.min_tokens, chat.prompts.max_tokens) == (64, 128)
    assert (chat.rollout.min_response_tokens, chat.rollout.max_response_tokens) == (64, 64)
    bfloat16 = run_config(settings("chat"), 4, tmp_path, "ppo-ray-bf16")
    assert (bfloat16.model.dtype, bfloat16.rollout.dtype) == ("bfloat16", "bfloat16")
    assert bfloat16.ppo == chat.ppo == notebook.ppo and bfloat16.prompts == chat.prompts


def test_the_machines_rates_are_of_the_same_work(monkeypatch) -> None:
    """With a clock by which every product takes a second, rates are counts."""
    monkeypatch.setattr(machine, "median_s", lambda call: call() is None or 1.0)
    monkeypatch.setattr(machine, "_COPY_BYTES", 1 << 20)
    shape = DecoderShape(layers=2, hidden=4, intermediate=6, query_width=4, key_width=2, vocab=10)
    found = machine.measure(shape, tokens=5, response_tokens=3, rows=7)
    # 240 parameters over 5 tokens and a head of 40 over 3, forward and twice backward; 14 maps and a head, 3 s each
    assert found.update_flops == 3 * 2 * (240 * 5 + 40 * 3) / (15 * 3)
    assert found.decode_flops == 2 * 7 * (240 + 40)
    assert found.copy_bytes == 1 << 20
