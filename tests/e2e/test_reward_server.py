"""A run that is scored over HTTP by `ppo-ray serve-reward`, in a process of its own."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ppo_ray.reward.classifier import Classifier
from tests.command_line import CommandLine

pytestmark = pytest.mark.slow


def test_a_run_learns_from_the_scores_of_a_server_and_ends_without_it(
    ppo_ray: CommandLine, tmp_path: Path, tiny_classifier: Path
) -> None:
    ppo_ray.environment["JUDGE_TOKEN"] = "s3cret-token"
    server = ppo_ray.start("serve-reward", str(ppo_ray.config), "--port", "0", "--token-env", "JUDGE_TOKEN")
    try:
        assert server.stderr is not None
        url = server.stderr.readline().partition(" at ")[2].partition(";")[0]
        judge = ("reward.path=null", f"reward.url={url}", "reward.token_env=JUDGE_TOKEN")
        options = (*judge, "rollout.engine=hf", "rollout.workers=1", "evaluation.num_prompts=0", "reward.retries=0")
        options += ("evaluation.num_samples=0", "reward.max_unscored_steps=0")
        result = ppo_ray.train(*options, "steps=2")
        assert result.returncode == 0, result.stderr
    finally:
        server.terminate()
        server.communicate(timeout=60)
    classifier = Classifier(str(tiny_classifier))
    for step in range(2):
        rows = pq.read_table(tmp_path / "run" / "trajectories" / f"step-{step:05d}.parquet").to_pylist()
        scores = classifier.score([row["prompt"] + row["response"] for row in rows])
        assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if b"s3cret-token" in path.read_bytes()] and len(written) > 5

    result = ppo_ray.train(*options, "resume=required", "steps=9")
    assert result.returncode == 1, result.stderr
    assert "the last step is without any score (reward.max_unscored_steps=0)" in result.stderr
    assert f"reward.url={url}: the batch has no scores: " in result.stderr and "s3cret-token" not in result.stderr
