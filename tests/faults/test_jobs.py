"""The jobs of docs/clusters.md, command by command, on a real head: a run stopped and submitted again is the same."""

import contextlib
import re
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml

from ppo_ray.config import load_config
from tests.command_line import OPTIONS, STEPS, CommandLine, events, lines
from tests.faults.conftest import Same
from tests.ray_head import Head, ray_head

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
JOBS = PAGE[PAGE.index("## Jobs") : PAGE.index("## The images")]


def shell(head: Head, folder: Path, script: str) -> "subprocess.Popen[str]":
    """Start what the page shows, in a shell of its own."""
    environment = head.environment | {"JUDGE_KEY": "forwarded-by-name"}
    return subprocess.Popen(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ended(process: "subprocess.Popen[str]", code: int, timeout: float = 240) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def write_config(path: Path, source: Path, steps: int) -> None:
    """Write a user's config: it does not say whether to resume."""
    config = load_config(source, ["rollout.engine=hf", f"steps={steps}", *OPTIONS])
    path.write_text(yaml.safe_dump(config.model_dump(exclude={"resume", "output_dir"})))


@pytest.mark.timeout(600)
def test_the_page_does_what_it_says(ppo_ray: CommandLine, tmp_path: Path, same_as_undisturbed: Same) -> None:
    start, submit, stop, again, judged, plain = re.findall(r"```sh\n(.*?)```", JOBS, flags=re.DOTALL)
    assert "ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1\n" in start  # as ray_head does
    config, run = tmp_path / "films.yaml", tmp_path / "runs" / "films"
    write_config(config, ppo_ray.config, 10_000)  # however long the command that stops it takes to start
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "judge.py").write_text("import os\nraise RuntimeError(os.environ['JUDGE_KEY'])\n")
    with ray_head(ppo_ray.environment) as head:
        ended(shell(head, tmp_path, submit), 0)
        deadline = time.monotonic() + 180
        while not lines(run):
            assert time.monotonic() < deadline, head.ray("job", "logs", "films-1").stdout
            time.sleep(0.05)
        assert "was stopped" in ended(shell(head, tmp_path, stop), 0)
        last = events(run)[-1]
        assert last["event"] == "interrupted"
        assert (run / "checkpoints" / "latest").readlink().name == f"step-{last['step']:05d}"
        assert len(lines(run)) == last["step"]
        assert ppo_ray.workers() == {}

        failing = shell(head, tmp_path, judged)
        write_config(config, ppo_ray.config, last["step"] + 2)
        said = ended(shell(head, tmp_path, again), 0)
        assert f"going on after {last['step']} steps from step-{last['step']:05d}" in said
        assert said.index("checkpoints/final") < said.index("succeeded")  # the log is followed to the end
        said = ended(failing, 2)
        assert "RuntimeError: forwarded-by-name" in said and "failed with exit code 2" in said

        steps = max(last["step"] + 4, STEPS["hf"])
        write_config(config, ppo_ray.config, steps)
        said = ended(shell(head, tmp_path, plain), 0)
        assert f"going on after {last['step'] + 2} steps" in said
        assert ppo_ray.workers() == {}
    same_as_undisturbed(run, "hf", steps)
    assert ppo_ray.wait_until_gone() == []
    with pytest.raises(OSError), contextlib.closing(socket.socket()) as port:
        port.connect((urlparse(head.address).hostname, urlparse(head.address).port))
