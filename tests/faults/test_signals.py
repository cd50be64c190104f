"""Ctrl-C in a terminal, which every process of the group gets, and a second signal, which does not wait."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_line import CommandLine, events, orphaned_shared_memory, wait_for_steps
from tests.faults.conftest import OPTIONS, Same

pytestmark = pytest.mark.slow

SLOW_UPDATE = """
import os
if os.environ.get('PPO_RAY_WORKER') == 'learner-0':
    import time
    from ppo_ray.learner import PPOLearner
    def update(self, *arguments, **options):
        open({mark!r}, 'a').close()
        time.sleep(120)
    PPOLearner.update = update
"""


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


def test_a_second_signal_does_not_wait(ppo_ray: CommandLine, tmp_path: Path) -> None:
    mark = tmp_path / "updating"
    (tmp_path / "sitecustomize.py").write_text(SLOW_UPDATE.format(mark=str(mark)))
    ppo_ray.environment["PYTHONPATH"] = str(tmp_path)
    before = orphaned_shared_memory()
    process = ppo_ray.start("train", str(ppo_ray.config), "rollout.engine=hf", "ray.stop_timeout_s=100")
    deadline = time.monotonic() + 180
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no update within 180 s"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # an update is finished first, and this one takes two minutes
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    errors = ppo_ray.end(process, signal.SIGTERM, timeout=20)
    assert process.returncode == 143, errors
    assert ppo_ray.wait_until_gone() == []
    assert orphaned_shared_memory() <= before
