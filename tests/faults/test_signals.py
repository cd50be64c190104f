"""Ctrl-C in a terminal, which every process of the group gets, and a second signal, which does not wait."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_line import CommandLine, events, lines, orphaned_shared_memory, wait_for_steps
from tests.faults.conftest import OPTIONS, Same

pytestmark = pytest.mark.slow

SLOW_UPDATE = """
import os
if os.environ.get('PPO_RAY_WORKER') == 'learner-0':
    import time
    from ppo_ray.learner.learner import PPOLearner
    update = PPOLearner.update
    def slow(self, *arguments, **options):
        open({mark!r}, 'a').close()
        time.sleep({seconds})
        return update(self, *arguments, **options)
    PPOLearner.update = slow
"""


def start_slow(ppo_ray: CommandLine, folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a run whose updates take so long, and return when the first is under way."""
    mark = folder / "updating"
    (folder / "sitecustomize.py").write_text(SLOW_UPDATE.format(mark=str(mark), seconds=seconds))
    ppo_ray.environment["PYTHONPATH"] = str(folder)
    process = ppo_ray.start("train", str(ppo_ray.config), "rollout.engine=hf", "ray.stop_timeout_s=100")
    deadline = time.monotonic() + 180
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no update within 180 s"
        time.sleep(0.1)
    return process


@pytest.mark.timeout(600)
def test_ctrl_c_in_a_terminal(ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", "steps=12", *OPTIONS)
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    wait_for_steps(process, run, 2)
    os.killpg(process.pid, signal.SIGINT)  # the driver, Ray's own processes and all actors
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert events(run)[-1]["event"] == "interrupted"
    assert ppo_ray.wait_until_gone() == []
    again = ppo_ray.train(*options, "--resume")
    assert again.returncode == 0, again.stderr
    same_as_undisturbed(run, "hf", 12)


def test_an_update_in_hand_is_finished_and_saved(ppo_ray: CommandLine, tmp_path: Path) -> None:
    process = start_slow(ppo_ray, tmp_path, 3)
    errors = ppo_ray.end(process, signal.SIGTERM)
    assert process.returncode == 143, errors
    assert [line["step"] for line in lines(tmp_path / "run")] == [0]
    assert (tmp_path / "run" / "checkpoints" / "latest").readlink().name == "step-00001"


def test_a_second_signal_does_not_wait(ppo_ray: CommandLine, tmp_path: Path) -> None:
    before = orphaned_shared_memory()
    process = start_slow(ppo_ray, tmp_path, 120)
    process.send_signal(signal.SIGTERM)  # the update is finished first
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    errors = ppo_ray.end(process, signal.SIGTERM, timeout=20)
    assert process.returncode == 143, errors
    assert ppo_ray.wait_until_gone() == []
    assert orphaned_shared_memory() <= before
