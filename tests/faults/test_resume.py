"""A run that is ended at any moment goes on as if nothing had been."""

import os
import signal
from pathlib import Path

import pytest

from tests.command_line import OPTIONS, STEPS, CommandLine, events, lines, orphaned_shared_memory, wait_for_steps
from tests.faults.conftest import Dice, Same

pytestmark = pytest.mark.slow
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.mark.timeout(900)
def test_ended_and_resumed_again_and_again(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice
) -> None:
    """Also Ctrl-C in a terminal, which all processes of its group get: driver, Ray's own and actors."""
    run, orphans = tmp_path / "run", orphaned_shared_memory()
    command = ("train", str(ppo_ray.config), "rollout.engine=hf", f"steps={STEPS['hf']}", *OPTIONS)
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
        assert ppo_ray.wait_until_gone() == []
        assert ppo_ray.open_to_others() == []
        assert orphaned_shared_memory() <= orphans
        if number != signal.SIGKILL:
            (interrupted,) = [event for event in events(run)[-1:] if event["event"] == "interrupted"]
            assert (run / "checkpoints" / "latest").readlink().name == f"step-{interrupted['step']:05d}"
            process = ppo_ray.start(*command, "--resume")

    newest = max((run / "checkpoints").glob("step-*"))
    torn = newest / "learner" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    last = ppo_ray.run(*command, "resume=auto")
    assert last.returncode == 0, last.stderr
    assert "optimizer.safetensors is not as it was written" in last.stdout
    assert "going on after" in last.stdout and f"from {newest.name}" not in last.stdout
    same_as_undisturbed(run, "hf")
    assert [event["event"] for event in events(run)].count("resumed") == 3
    assert ppo_ray.leftovers() == []

    done = ppo_ray.run(*command, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout
    same_as_undisturbed(run, "hf")
