"""A submitted job that is stopped by `ray job stop`, and submitted again."""

import contextlib
import socket
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest

from tests.command_line import CommandLine, events, lines
from tests.faults.conftest import OPTIONS, Same
from tests.ray_head import ray_head

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.mark.timeout(600)
def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same
) -> None:
    run = tmp_path / "run"
    options = ("rollout.engine=hf", f"steps={STEPS}", *OPTIONS, "resume=auto")
    entrypoint = ("python", "-m", "ppo_ray", "train", str(ppo_ray.config), *options)
    patience = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    with ray_head(ppo_ray.environment) as head:
        submitted = head.submit("first", *entrypoint, wait=False, variables=patience)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        deadline = time.monotonic() + 180
        while len(lines(run)) < 3:
            assert time.monotonic() < deadline, head.ray("job", "logs", "first").stdout
            time.sleep(0.05)
        stopped = head.ray("job", "stop", "first")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert "was stopped" in head.ray("job", "status", "first").stdout
        last = events(run)[-1]
        assert last["event"] == "interrupted"
        assert (run / "checkpoints" / "latest").readlink().name == f"step-{last['step']:05d}"
        assert len(lines(run)) < STEPS
        assert ppo_ray.workers() == {}

        again = head.submit("second", *entrypoint, wait=True, variables=patience)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "going on after step" in again.stdout  # the log is followed to the end
        assert ppo_ray.workers() == {}
    same_as_undisturbed(run, "hf", STEPS)
    assert ppo_ray.wait_until_gone() == []
    with pytest.raises(OSError), contextlib.closing(socket.socket()) as port:
        port.connect((urlparse(head.address).hostname, urlparse(head.address).port))
