"""A run that is scored over HTTP by `ppo-ray serve-reward`, in a process of its own."""

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ppo_ray.reward.classifier import Classifier
from tests.command_line import CommandLine

pytestmark = pytest.mark.slow


def test_a_run_learns_from_the_scores_of_a_server_and_ends_when_that_does(
    ppo_ray: CommandLine, tmp_path: Path, tiny_classifier: Path
) -> None:
    ppo_ray.environment["JUDGE_TOKEN"] = "s3cret-token"
    tables = [tmp_path / "run" / "trajectories" / f"step-{step:05d}.parquet" for step in range(2)]
    server = ppo_ray.start("serve-reward", str(ppo_ray.config), "--port", "0", "--token-env", "JUDGE_TOKEN")
    assert server.stderr is not None
    url = server.stderr.readline().partition(" at ")[2].partition(";")[0]
    options = ("reward.path=null", f"reward.url={url}", "reward.token_env=JUDGE_TOKEN", "reward.max_unscored_steps=0")
    small = ("rollout.engine=hf", "rollout.workers=1", "evaluation.num_prompts=0", "evaluation.num_samples=0")
    run = ppo_ray.start("train", str(ppo_ray.config), *options, *small, "reward.retries=1", "steps=1000")
    try:
        deadline = time.monotonic() + 200
        while not tables[-1].exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        server.terminate()
        said, errors = run.communicate(timeout=200)
    finally:
        for process in (server, run):
            process.kill()
            process.communicate(timeout=60)
    assert run.returncode == 1, errors
    assert "the last step is without any score (reward.max_unscored_steps=0)" in errors
    assert f"reward.url={url}: the batch has no scores: " in errors and "s3cret" not in said + errors
    classifier = Classifier(str(tiny_classifier))
    for table in tables:
        rows = pq.read_table(table).to_pylist()
        scores = classifier.score([row["prompt"] + row["response"] for row in rows])
        assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if b"s3cret-token" in path.read_bytes()]
