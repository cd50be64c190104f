"""A run that is ended at any moment goes on as if nothing had been."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from ppo_ray.run.log import read_actors, read_steps
from tests.command_line import OPTIONS, STEPS, CommandLine, events, lines, orphaned_shared_memory, wait_for_steps
from tests.faults.conftest import Dice, Same
from tests.run.stores import READERS, tracker_options

pytestmark = pytest.mark.slow
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.mark.timeout(900)
def test_ended_and_resumed_again_and_again(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice
) -> None:
    """Also Ctrl-C in a terminal, which all processes of its group get: driver, Ray's own and actors.

    Trackers follow it, as far as they are installed: their stores hold each step once, as it is in the log.
    """
    run, orphans = tmp_path / "run", orphaned_shared_memory()
    trackers = [name for name in READERS if importlib.util.find_spec(name)]
    ppo_ray.environment["TRACKIO_DIR"] = str(tmp_path / "trackio")
    tracking = [
        f"tracking.trackers=[{','.join(trackers)}]",
        "tracking.project=films",
        "tracking.only_checkpointed=true",
    ]
    tracking += [f"tracking.options={{{', '.join(tracker_options(name, tmp_path) for name in trackers)}}}"]
    tracking += ["tracking.close_timeout_s=120"]
    command = ("train", str(ppo_ray.config), "rollout.engine=hf", f"steps={STEPS['hf']}", *OPTIONS, *tracking)
    process = ppo_ray.start(*command)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        wait_for_steps(process, run, len(lines(run)) + 2)  # of its own: a run that only starts has no handlers yet
        dice.nap(run)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
            _, errors = process.communicate(timeout=90)
        else:
            errors = ppo_ray.end(process, number)
        assert process.returncode == CODES[number], errors
        assert "Traceback" not in errors
        assert ppo_ray.wait_until_gone(90) == []  # trackers send what is left
        assert ppo_ray.open_to_others() == []
        assert orphaned_shared_memory() <= orphans
        if number != signal.SIGKILL:
            (interrupted,) = [event for event in events(run)[-1:] if event["event"] == "interrupted"]
            assert (run / "checkpoints" / "latest").readlink().name == f"step-{interrupted['step']:05d}"
            process = ppo_ray.start(*command, "--resume")

    *_, older, newest = sorted((run / "checkpoints").glob("step-*"))
    torn = newest / "learner" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    last = ppo_ray.run(*command, "resume=auto")
    assert last.returncode == 0, last.stderr
    assert "optimizer.safetensors is not as it was written" in last.stdout
    assert "going on after" in last.stdout and f"from {newest.name}" not in last.stdout
    same_as_undisturbed(run, "hf")
    assert [event["event"] for event in events(run)].count("resumed") == 3
    assert ppo_ray.leftovers() == []
    made_again = range(int(older.name[5:]), int(newest.name[5:]))  # a checkpoint held them, so that they were sent
    for name in trackers:
        check_store(name, run, tmp_path, made_again)
    told = read_actors(run)
    assert list(told) == list(range(STEPS["hf"]))  # those of the steps that were made again are there once
    for actors in told.values():
        assert {"rollout-0", "rollout-1", "reward-0", "learner-0"} <= actors.keys()
        for name, figures in actors.items():
            assert figures["host"] and figures[f"memory/{name.rpartition('-')[0]}_gib"] > 0.05

    done = ppo_ray.run(*command, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout
    same_as_undisturbed(run, "hf")


def check_store(name: str, run: Path, home: Path, made_again: range) -> None:
    """Check that a tracker holds every step once, with the values of the log.

    Args:
        name: of the tracker.
        run: its folder.
        home: folder of the stores outside it.
        made_again: steps that were sent, and made again after that: their seconds and memory are the first ones.
    """
    rows, config = READERS[name](run, home, (run / "tracking" / "run_id").read_text().strip())
    logged = {int(row.pop("step")): row for row in read_steps(run)}
    assert sorted(rows) == sorted(logged) == list(range(STEPS["hf"])) and "learning_rate" in config

    def values(step: int, row: dict[str, float]) -> dict[str, float]:
        left_out = ("samples", *(("time/", "memory/") if step in made_again else ()))
        return {key: value for key, value in row.items() if value == value and not key.startswith(left_out)}

    for step, row in logged.items():
        assert values(step, rows[step]) == values(step, row), f"{name}, step {step}"
