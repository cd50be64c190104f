"""A run that is ended at any moment goes on as if nothing had been."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.command_line import CommandLine, events, lines, orphaned_shared_memory, wait_for_steps
from tests.faults.conftest import OPTIONS, Same

pytestmark = pytest.mark.slow
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "steps", "signals"),
    [("hf", 30, [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]), ("vllm", 12, [signal.SIGKILL, signal.SIGTERM])],
)
def test_ended_and_resumed_again_and_again(
    ppo_ray: CommandLine,
    tmp_path: Path,
    same_as_undisturbed: Same,
    engine: str,
    steps: int,
    signals: list[signal.Signals],
) -> None:
    run, orphans = tmp_path / "run", orphaned_shared_memory()
    command = ("train", str(ppo_ray.config), f"rollout.engine={engine}", f"steps={steps}", *OPTIONS)
    process = ppo_ray.start(*command)
    for number in signals:
        wait_for_steps(process, run, len(lines(run)) + 2)  # of its own: a run that only starts has no handlers yet
        time.sleep(random.uniform(0, 0.3))
        errors = ppo_ray.end(process, number)
        assert process.returncode == CODES[number], errors
        assert "Traceback" not in errors
        assert ppo_ray.wait_until_gone() == []
        assert orphaned_shared_memory() <= orphans
        if number != signal.SIGKILL:
            (interrupted,) = [event for event in events(run)[-1:] if event["event"] == "interrupted"]
            assert (run / "checkpoints" / "latest").readlink().name == f"step-{interrupted['step']:05d}"
        process = ppo_ray.start(*command, "--resume")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "going on after step" in output
    same_as_undisturbed(run, engine, steps)
    assert [event["event"] for event in events(run)].count("resumed") == len(signals)
    assert ppo_ray.leftovers() == []

    done = ppo_ray.run(*command, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout
    same_as_undisturbed(run, engine, steps)


@pytest.mark.timeout(600)
def test_the_newest_whole_checkpoint_is_taken_and_other_work_refused(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same
) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", *OPTIONS)
    shorter = ppo_ray.train(*options, "steps=7")
    assert shorter.returncode == 0, shorter.stderr

    other = ppo_ray.train(*options, "steps=12", "seed=1", "ppo.clip_range=0.1", "--resume")
    assert other.returncode == 2
    assert "seed: 0 -> 1" in other.stderr and "ppo.clip_range: 0.2 -> 0.1" in other.stderr
    fewer = ppo_ray.train(*options, "steps=5", "resume=auto")
    assert fewer.returncode == 2 and "steps=5: the run has made 7 steps already" in fewer.stderr
    none = ppo_ray.train(*options, f"output_dir={tmp_path / 'nothing'}", "--resume")
    assert none.returncode == 2 and "holds no run to go on with" in none.stderr

    torn = run / "checkpoints" / "step-00007" / "learner" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    longer = ppo_ray.train(*options, "steps=12", "resume=auto")
    assert longer.returncode == 0, longer.stderr
    assert "optimizer.safetensors is not as it was written" in longer.stdout
    assert "going on after step 6 from step-00006; steps: 7 -> 12" in longer.stdout
    same_as_undisturbed(run, "hf", 12)
    assert len(lines(run)) == 12
