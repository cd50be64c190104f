"""A run of groups with refills, whose worker dies within one and whose driver dies: the same weights at the end."""

import signal
from pathlib import Path

import pytest

from tests.command_line import OPTIONS as FAULTS
from tests.command_line import CommandLine, events, lines, wait_for_steps
from tests.faults.conftest import Dice, Same

pytestmark = pytest.mark.slow
STEPS = 8
OPTIONS = (
    *("rollout.batch_size=16", "rollout.responses_per_prompt=4", "rollout.flat_groups=refill"),
    *("reward.path=null", f"reward.function={__name__}:score"),
    *("ppo.advantages=grpo", "ppo.policy_loss=gspo", "ppo.clip_range=0.01", "ppo.minibatch_size=8"),
)


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Give few scores, so that many groups are flat."""
    return [float(" " in response[:6]) for response in responses]


@pytest.mark.timeout(900)
def test_groups_are_refilled_as_if_nothing_had_happened(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same, dice: Dice
) -> None:
    run = tmp_path / "run"
    command = ("train", str(ppo_ray.config), "rollout.engine=hf", f"steps={STEPS}", *FAULTS, *OPTIONS)
    process = ppo_ray.start(*command)
    wait_for_steps(process, run, 1)
    dice.nap(run)
    ppo_ray.workers()["rollout-1"].send_signal(signal.SIGKILL)
    wait_for_steps(process, run, len(lines(run)) + 2)
    dice.nap(run)
    ppo_ray.end(process, signal.SIGKILL)
    assert ppo_ray.wait_until_gone() == []
    again = ppo_ray.run(*command, "--resume")
    assert again.returncode == 0, again.stderr
    assert "16 responses, 4 to a prompt" in again.stdout
    same_as_undisturbed(run, "hf", STEPS, *OPTIONS)
    replaced = [event["worker"] for event in events(run) if event["event"] == "worker_replaced"]
    assert replaced == ["rollout-1"]
    assert sum(line["groups/num_refilled"] for line in lines(run)) >= 1
    assert {line["groups/num_learned"] for line in lines(run)} == {4.0}
