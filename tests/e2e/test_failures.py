"""How runs end that do not end well: the exit code, what is said, and what stays behind (nothing)."""

from pathlib import Path

import pytest

from tests.command_line import CommandLine

pytestmark = pytest.mark.slow


def test_a_worker_that_fails_to_start_is_reported_with_its_own_error(ppo_ray: CommandLine) -> None:
    ppo_ray.put_on_path(
        "breaks.py",
        "import os\nif 'PPO_RAY_WORKER' in os.environ:\n    raise ImportError('licence server is away')\n"
        "def score(prompts, responses): return [0.0] * len(responses)\n",
    )
    options = ("rollout.engine=hf", "rollout.workers=1", "reward.path=null", "reward.function=breaks:score")
    result = ppo_ray.train(*options)
    assert result.returncode in (1, 2)
    assert "reward-0" in result.stderr
    assert "licence server is away" in result.stderr
    assert ppo_ray.wait_until_gone() == []
    assert ppo_ray.open_to_others() == []  # the logs that the error names are this account's alone


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
