"""Workers that hang, and parts that fail again and again."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.command_line import CommandLine, events, lines, wait_for_steps
from tests.faults.conftest import OPTIONS, Same

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_a_stopped_worker_of_each_kind(ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", "steps=30", *OPTIONS, "ray.ping_timeout_s=6")
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    stopped = ["rollout-1", "reward-0", "learner-0"]
    random.shuffle(stopped)
    for name in stopped:
        wait_for_steps(process, run, len(lines(run)) + 1)
        time.sleep(random.uniform(0, 0.5))
        ppo_ray.workers()[name].send_signal(signal.SIGSTOP)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    same_as_undisturbed(run, "hf", 30)
    found = {event["worker"]: event["message"] for event in events(run) if event["event"] == "worker_replaced"}
    assert found.keys() == set(stopped), output
    assert all("did not answer a control call for 6 s" in message for message in found.values())
    assert ppo_ray.wait_until_gone() == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os._exit(3)", "reward-0 was lost 2 times in a row (ray.max_restarts=1); the last time: reward-0 (pid"),
        ("time.sleep(1000)", "scoring: no answer within 20 s from reward-0 (pid"),
        ("return [1.0]", "returned 1 scores for 4 texts"),
    ],
)
def test_a_reward_function_that_fails_for_ever_ends_the_run_and_costs_no_step(
    ppo_ray: CommandLine, tmp_path: Path, body: str, said: str
) -> None:
    run = tmp_path / "run"
    (tmp_path / "fails.py").write_text(
        "import os, pathlib, time\n"
        "def score(prompts, responses):\n"
        f"    if pathlib.Path({str(run)!r}, 'trajectories', 'step-00002.parquet').exists():\n"
        f"        {body}\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    ppo_ray.environment["PYTHONPATH"] = str(tmp_path)
    options = (
        "reward.path=null",
        "reward.function=fails:score",
        "evaluation.num_prompts=0",
        "evaluation.num_samples=0",
    )
    limits = ("ray.max_restarts=1", "ray.call_timeout_s=20")
    result = ppo_ray.train("rollout.engine=hf", "steps=9", *options, *limits)
    assert result.returncode in (1, 2), result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines(run)) == 3
    assert (run / "checkpoints" / "latest").readlink().name == "step-00003"
    assert events(run)[-1]["event"] == "interrupted"
    assert ppo_ray.wait_until_gone() == []
