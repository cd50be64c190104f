"""Workers that hang, and parts that fail again and again."""

import signal
from pathlib import Path

import pytest

from tests.command_line import OPTIONS, STEPS, CommandLine, events, lines, wait_for_steps
from tests.faults.conftest import Dice, Same

pytestmark = pytest.mark.slow

FAILS = """
import os, pathlib, time
run = pathlib.Path({run!r})
def score(prompts, responses):
    if (run / "trajectories" / "step-00002.parquet").exists():
        if (run / "slept").exists():
            os._exit(3)
        (run / "slept").touch()
        time.sleep(1000)
    return [float(len(response)) for response in responses]
"""


@pytest.mark.timeout(600)
def test_a_stopped_worker_of_each_kind(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice
) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", f"steps={STEPS['hf']}", *OPTIONS, "ray.ping_timeout_s=6")
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    stopped = dice.sample(["rollout-1", "reward-0", "learner-0"], 3)
    for name in stopped:
        wait_for_steps(process, run, len(lines(run)) + 1)
        dice.nap(run)
        ppo_ray.workers()[name].send_signal(signal.SIGSTOP)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    same_as_undisturbed(run, "hf")
    found = {event["worker"]: event["message"] for event in events(run) if event["event"] == "worker_replaced"}
    assert found.keys() == set(stopped), output
    assert all("did not answer a control call for 6 s" in message for message in found.values())
    assert ppo_ray.wait_until_gone() == []


def test_a_reward_function_that_hangs_and_dies_ends_the_run_and_costs_no_step(
    ppo_ray: CommandLine, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ppo_ray.put_on_path("fails.py", FAILS.format(run=str(run)))
    options = ("rollout.engine=hf", "rollout.workers=1", "steps=9", "reward.path=null", "reward.function=fails:score")
    limits = ("ray.max_restarts=1", "ray.call_timeout_s=15")
    nothing_held_out = ("evaluation.num_prompts=0", "evaluation.num_samples=0")
    result = ppo_ray.train(*options, *limits, *nothing_held_out)
    assert result.returncode == 1, result.stderr
    assert "reward-0 was lost 2 times in a row (ray.max_restarts=1); the last time: reward-0 (pid" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines(run)) == 3
    assert (run / "checkpoints" / "latest").readlink().name == "step-00003"
    assert [event["event"] for event in events(run)] == ["worker_replaced", "interrupted"]
    assert "scoring: no answer within 15 s from reward-0 (pid" in events(run)[0]["message"]
    assert ppo_ray.wait_until_gone() == []
