"""Actors that die, at any moment, again and again: the weights at the end are those of a run in which none did."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_line import CommandLine, events, lines, wait_for_steps
from tests.faults.conftest import OPTIONS, Same

pytestmark = pytest.mark.slow


def kill_at_random(ppo_ray: CommandLine, process: subprocess.Popen[str], run: Path, kinds: tuple[str, ...], times: int):
    """Kill a worker of each kind so many times, at moments within a few steps; returns the names of those killed."""
    killed = [kind for kind in kinds for _ in range(times)]
    random.shuffle(killed)
    names = []
    for kind in killed:
        wait_for_steps(process, run, len(lines(run)) + 1)
        time.sleep(random.uniform(0, 0.5))
        name, worker = random.choice(ppo_ray.wait_for_workers(kind))
        worker.send_signal(signal.SIGKILL)
        names.append(name)
    return names


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["rollout", "reward", "learner"])
def test_ten_kills_at_random_moments(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, kind: str
) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", "steps=30", *OPTIONS)
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    killed = kill_at_random(ppo_ray, process, run, (kind,), 10)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    same_as_undisturbed(run, "hf", 30)
    replaced = [event["worker"] for event in events(run) if event["event"] == "worker_replaced"]
    assert set(replaced) <= set(killed) and replaced, output
    assert ppo_ray.leftovers() == []


@pytest.mark.timeout(900)
def test_a_vllm_engine_of_each_worker(ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=vllm", "steps=12", "ray.placement=colocated", *OPTIONS)  # the others' run is apart
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    for number in (0, 1):
        wait_for_steps(process, run, len(lines(run)) + 1)
        time.sleep(random.uniform(0, 0.5))
        ppo_ray.workers()[f"rollout-{number}"].send_signal(signal.SIGKILL)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    same_as_undisturbed(run, "vllm", 12)
    replaced = {event["worker"] for event in events(run) if event["event"] == "worker_replaced"}
    assert replaced == {"rollout-0", "rollout-1"}, output
    assert ppo_ray.leftovers() == []
