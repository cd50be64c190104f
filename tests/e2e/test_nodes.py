"""Runs with several learner ranks: the same samples, the same weights, and nothing lost when a rank dies."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests.command_line import CommandLine, events, lines, wait_for_steps

pytestmark = pytest.mark.slow
STEPS = 6


def sampled(run: Path) -> list[object]:
    files = sorted((run / "trajectories").glob("*.parquet"))
    return [pq.read_table(file, columns=["response_ids"]).to_pylist() for file in files]


def largest_difference(run: Path, other: Path) -> float:
    pairs = [
        (load_file(folder / "checkpoints" / "final" / name) for folder in (run, other))
        for name in ("model.safetensors", "value_head/value_head.safetensors")
    ]
    return max(float(np.abs(a[key] - b[key]).max()) for a, b in pairs for key in a)


@pytest.mark.timeout(900)
def test_ranks_train_what_one_trains_and_are_rebuilt_together(ppo_ray: CommandLine, tmp_path: Path) -> None:
    options = ("rollout.engine=hf", f"steps={STEPS}", "checkpoint.every_steps=2", "ppo.learning_rate=1e-4")
    alone = ppo_ray.train(*options, f"output_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr

    two = (*options, "learner.workers=2")
    run = tmp_path / "two"
    together = ppo_ray.train(*two, f"output_dir={run}")
    assert together.returncode == 0, together.stderr
    assert sampled(run) == sampled(tmp_path / "alone")
    assert largest_difference(run, tmp_path / "alone") < 1e-5

    disturbed = tmp_path / "disturbed"
    process = ppo_ray.start("train", str(ppo_ray.config), *two, f"output_dir={disturbed}")
    wait_for_steps(process, disturbed, 3)
    ppo_ray.workers()["learner-1"].kill()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert [line["step"] for line in lines(disturbed)] == list(range(STEPS))
    assert largest_difference(disturbed, run) == 0
    kinds = {event["event"]: event["worker"] for event in events(disturbed)}
    assert kinds == {"worker_replaced": "learner-1", "learner_rebuilt": "learner-1"}, output
    assert ppo_ray.wait_until_gone() == []
