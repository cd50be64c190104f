"""Actors that die, at any moment, again and again: the weights at the end are those of a run in which none did."""

import signal
from pathlib import Path

import pytest

from tests.command_line import (
    ADAPTED,
    OPTIONS,
    STEPS,
    CommandLine,
    events,
    lines,
    orphaned_shared_memory,
    wait_for_steps,
)
from tests.faults.conftest import Dice, Same

pytestmark = pytest.mark.slow
KINDS = ("rollout", "reward", "learner")


@pytest.mark.timeout(3600)
def test_kills_at_random_moments(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice, pytestconfig: pytest.Config
) -> None:
    """So many of each kind as `--kills` says, in any order; each is killed within a few steps of the one before."""
    run, kills = tmp_path / "run", pytestconfig.getoption("--kills") * len(KINDS)
    steps = max(STEPS["hf"], 5 * kills)
    options = ("rollout.engine=hf", f"steps={steps}", "reward.workers=2", *OPTIONS)
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    killed = set()
    for kind in dice.sample(KINDS, kills, counts=[pytestconfig.getoption("--kills")] * len(KINDS)):
        wait_for_steps(process, run, len(lines(run)) + 1)
        dice.nap(run)
        name, worker = dice.choice(ppo_ray.wait_for_workers(kind))
        worker.send_signal(signal.SIGKILL)
        killed.add(name)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    same_as_undisturbed(run, "hf", steps)
    replaced = {event["worker"] for event in events(run) if event["event"] == "worker_replaced"}
    assert replaced <= killed and {name.split("-")[0] for name in replaced} == set(KINDS), output
    assert ppo_ray.leftovers() == []


@pytest.mark.timeout(900)
def test_a_vllm_engine_and_its_driver(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice
) -> None:
    run, orphans, engine = tmp_path / "run", orphaned_shared_memory(), f"rollout-{dice.randrange(2)}"
    options = (
        "rollout.engine=vllm",
        f"steps={STEPS['vllm']}",
        "ray.placement=colocated",
        *OPTIONS,
    )  # the other is apart
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    wait_for_steps(process, run, 1)
    dice.nap(run)
    ppo_ray.workers()[engine].send_signal(signal.SIGKILL)
    wait_for_steps(process, run, len(lines(run)) + 2)  # with its successor
    dice.nap(run)
    ppo_ray.end(process, signal.SIGKILL)
    assert ppo_ray.wait_until_gone() == []
    assert orphaned_shared_memory() <= orphans

    again = ppo_ray.train(*options, "--resume")
    assert again.returncode == 0, again.stderr
    assert "going on after" in again.stdout
    same_as_undisturbed(run, "vllm")
    replaced = {event["worker"] for event in events(run) if event["event"] == "worker_replaced"}
    assert replaced == {engine}, again.stdout
    assert ppo_ray.leftovers() == []


@pytest.mark.timeout(900)
def test_a_run_that_trains_adapters(ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same) -> None:
    """One of each kind, then the driver. An engine's successor has the frozen weights, and is sent the adapters."""
    run, steps = tmp_path / "run", STEPS["adapted"]
    options = ("rollout.engine=hf", f"steps={steps}", *OPTIONS, *ADAPTED)
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    for kind in KINDS:
        wait_for_steps(process, run, len(lines(run)) + 1)
        ppo_ray.wait_for_workers(kind)[0][1].send_signal(signal.SIGKILL)
    wait_for_steps(process, run, len(lines(run)) + 2)
    ppo_ray.end(process, signal.SIGKILL)
    assert ppo_ray.wait_until_gone() == []
    assert 5 <= len(lines(run)) < steps

    again = ppo_ray.train(*options, "--resume")
    assert again.returncode == 0, again.stderr
    assert "going on after" in again.stdout
    same_as_undisturbed(run, "hf", steps, *ADAPTED)
    replaced = {event["worker"].split("-")[0] for event in events(run) if event["event"] == "worker_replaced"}
    assert replaced == set(KINDS), again.stdout
    assert ppo_ray.leftovers() == []
