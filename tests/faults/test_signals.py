"""A signal during an update, and a second signal, which does not wait."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_line import NO_FORKS, CommandLine, lines, orphaned_shared_memory

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
    ppo_ray.put_on_path("sitecustomize.py", NO_FORKS + SLOW_UPDATE.format(mark=str(mark), seconds=seconds))
    options = ("rollout.engine=hf", "rollout.workers=1", "ray.stop_timeout_s=100")
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    deadline = time.monotonic() + 180
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no update within 180 s"
        time.sleep(0.1)
    return process


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
