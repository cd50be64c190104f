"""A run whose ranks hold shares of the model: engines get it whole, and one rank goes on with its checkpoint.

Four ranks in two groups: each group has the whole model between its two ranks.
"""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from ppo_ray.models.saving import find_parts
from tests.command_line import CommandLine, lines

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_shares_are_sent_whole_and_saved_whole(ppo_ray: CommandLine, tmp_path: Path) -> None:
    options = (
        "rollout.engine=hf",
        "rollout.workers=1",
        "checkpoint.every_steps=1",
        "ppo.learning_rate=1e-4",
        f"output_dir={tmp_path}",
    )
    ppo_ray.put_on_path("sitecustomize.py", "import os\nos.sched_getaffinity = lambda _: range(4)")  # a CPU per rank
    groups = ("learner.workers=4", "learner.sharding=fsdp2", "learner.shard_size=2")
    shares = ppo_ray.train(*options, "steps=1", *groups)
    assert shares.returncode == 0, shares.stderr
    assert "self-check passed" in shares.stdout
    first = tmp_path / "checkpoints" / "step-00001"
    for name in ("model.safetensors", "learner/optimizer.safetensors"):  # each rank has written its own
        parts = find_parts(first / name)
        assert len(parts) == 4 and all(map(load_file, parts))
    alone = ppo_ray.train(*options, "steps=2", "resume=required")
    assert alone.returncode == 0, alone.stderr
    assert "learner.sharding: fsdp2 -> ddp" in alone.stdout
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert all(line["mismatch/logprob_mean"] < 1e-4 for line in lines(tmp_path))
