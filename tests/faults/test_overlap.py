"""Generation that overlaps with learning: what is disturbed is made again by the very weights that made it first."""

import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ppo_ray import trajectory
from tests.command_line import OPTIONS, CommandLine, events, lines, wait_for_steps
from tests.faults.conftest import Dice, Same

pytestmark = pytest.mark.slow
STEPS = 12
OVERLAP = (
    *("rollout.max_staleness=1", "ppo.importance_cap=2"),
    "rollout.workers=1",  # beside a learner of one thread, on two cores
)


def kill(ppo_ray: CommandLine, kind: str) -> None:
    ppo_ray.wait_for_workers(kind)[0][1].send_signal(signal.SIGKILL)


@pytest.mark.timeout(900)
def test_disturbed_at_random_moments(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice
) -> None:
    run = tmp_path / "run"
    command = ("train", str(ppo_ray.config), "rollout.engine=hf", f"steps={STEPS}", *OPTIONS, *OVERLAP)
    process = ppo_ray.start(*command)
    wait_for_steps(process, run, 2)
    dice.nap(run)
    kill(ppo_ray, "rollout")  # its shard is made again by the weights before the update that is made meanwhile
    wait_for_steps(process, run, 5)
    number = dice.choice([signal.SIGTERM, signal.SIGKILL])
    dice.nap(run)
    errors = ppo_ray.end(process, number)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number], errors
    assert ppo_ray.wait_until_gone() == []
    newest = max((run / "checkpoints").glob("step-*"))  # whole, though a killed driver may not have linked it yet
    batch = pq.read_table(newest / "ahead.parquet")
    trajectory.validate(batch)
    step = int(newest.name.removeprefix("step-"))
    assert (set(batch["step"].to_pylist()), set(batch["policy_version"].to_pylist())) == ({step}, {step - 1})

    process = ppo_ray.start(*command, "--resume")
    wait_for_steps(process, run, len(lines(run)) + 1)
    dice.nap(run)
    kill(ppo_ray, "learner")  # rebuilt from a checkpoint, with the batch that it held there
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"going on after {step} steps from step-{step:05d}" in output
    same_as_undisturbed(run, "hf", STEPS, *OVERLAP)
    assert [event["event"] for event in events(run)].count("learner_rebuilt") == 1, output

    for step, line in enumerate(lines(run)):
        version, staleness = max(step - 1, 0), min(step, 1)
        table = pq.read_table(run / "trajectories" / f"step-{step:05d}.parquet")
        assert table["sample_id"].to_pylist() == list(range(8 * step, 8 * step + 8))
        assert set(table["policy_version"].to_pylist()) == {version}
        assert (line["rollout/staleness_mean"], line["rollout/staleness_max"]) == (staleness, staleness)
        assert (line["mismatch/logprob_max"] < 1e-3) == (staleness == 0)  # the step between is what differs
        assert line["policy/ratio_first"] == pytest.approx(1, abs=1e-6)
    assert ppo_ray.leftovers() == []
