"""How runs end that do not end well: the exit code, what is said, and what stays behind (nothing)."""

from pathlib import Path

import pytest

from tests.command_line import CommandLine, wait_for_steps

pytestmark = pytest.mark.slow


def test_a_worker_that_fails_to_start_is_reported_with_its_own_error(ppo_ray: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(
        "import os\nif 'PPO_RAY_WORKER' in os.environ:\n    raise ImportError('licence server is away')\n"
        "def score(prompts, responses): return [0.0] * len(responses)\n"
    )
    ppo_ray.environment["PYTHONPATH"] = str(tmp_path)
    result = ppo_ray.train("rollout.engine=hf", "reward.path=null", "reward.function=breaks:score")
    assert result.returncode in (1, 2)
    assert "reward-0" in result.stderr
    assert "licence server is away" in result.stderr
    assert ppo_ray.wait_until_gone() == []


def test_a_worker_that_is_killed_ends_the_run_by_name(ppo_ray: CommandLine, tmp_path: Path) -> None:
    process = ppo_ray.start("train", str(ppo_ray.config), "rollout.engine=hf", "steps=1000", "ray.max_restarts=0")
    wait_for_steps(process, tmp_path / "run", 1)
    ppo_ray.workers()["rollout-1"].kill()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rollout-1 was lost 1 times in a row (ray.max_restarts=0)" in errors
    assert (tmp_path / "run" / "checkpoints" / "latest" / "learner" / "state.json").is_file()
    assert ppo_ray.wait_until_gone() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"rollout.batch_sise=8": "rollout.batch_size", "rollout.batch_size=many": "rollout.batch_size"},
        {"ppo.minibatch_size=3": "ppo.minibatch_size", "rollout.workers=4096": "rollout.workers"},
        {
            "model.path=/no/such/model": "/no/such/model",
            "prompts.path=/no/such/data.parquet": "/no/such/data.parquet",
            "reward.label=HAPPY": "POSITIVE",
        },
        {"prompts.column=review": "text"},
        {"prompts.min_chars=100000": "prompts.min_chars"},
    ],
)
def test_bad_input_ends_before_any_work(ppo_ray: CommandLine, tmp_path: Path, wrong: dict[str, str]) -> None:
    result = ppo_ray.train(*wrong)
    assert result.returncode == 2, result.stderr
    for message in wrong.values():  # all at once
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_not_touched(ppo_ray: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    result = ppo_ray.train()
    assert result.returncode == 2
    assert "output_dir" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
