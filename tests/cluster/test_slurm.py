"""The Slurm script, run with stand-ins for Slurm, Ray and Python that record what they are asked."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.linters import lint

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"
TEXT = SCRIPT.read_text()

STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then echo node-a; echo node-b; else echo "$*" >"$RECORD/scontrol"; fi',
    "getent": "echo 127.0.1.1 STREAM node-a; echo 10.0.0.7 STREAM",
    "srun": 'echo "$*" >"$RECORD/srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # symmetric-run: runs what is behind `--` and exits with its code, and with 0 if Ray does not start
    "ray": """
        echo "$*" >"$RECORD/ray"; env | grep ^RAY_ >"$RECORD/environment"
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$RECORD/mode"; cp "$RAY_AUTH_TOKEN_PATH" "$RECORD/token"
        if [[ $RAY_DOES == fail ]]; then echo "Failed to start Ray" >&2; exit 0; fi
        if [[ $RAY_DOES == hang ]]; then touch "$RECORD/up"; exec sleep 60; fi
        trap 'touch "$RECORD/ray_was_told"' TERM
        while [[ $1 != -- ]]; do shift; done; shift
        "$@"; exit""",
    "python": """
        echo "$*" >"$RECORD/python"; [[ $DRIVER_DOES != run ]] && exit "$DRIVER_DOES"
        trap 'touch "$RECORD/driver_was_told"; exit 143' TERM
        touch "$RECORD/up"; for _ in {1..600}; do sleep 0.1; done""",
}


@dataclass
class Job:
    """A job of two nodes, of which this machine is the first."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, body in STAND_INS.items():
            program = self.folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/usr/bin/env bash\n{body}\n")
            program.chmod(0o755)
        (self.folder / "record").mkdir()
        (self.folder / "submitted").mkdir()

    @property
    def number(self) -> int:
        return 1_000_000_000 + os.getpid()  # none of Slurm's

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "RECORD": str(self.folder / "record"),
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_ON_NODE": "24",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_MEM_PER_NODE": "1000",
            "RAY_DOES": "start",
            "DRIVER_DOES": "0",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=self.folder / "submitted",
            env=environment | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def tell(self, number: signal.Signals, **variables: str) -> int:
        """Start it, send it a signal when the driver (or Ray, if that hangs) is up, and return its exit code."""
        process = self.start("run.yaml", **variables)
        deadline = time.monotonic() + 60
        while self.record("up") is None:
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode

    def record(self, name: str) -> str | None:
        path = self.folder / "record" / name
        return path.read_text().strip() if path.exists() else None


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    assert list((tmp_path / "submitted").iterdir()) == []  # the token is gone
    rays = Path(f"/tmp/ppo-ray-{job.number}")
    if rays.exists():
        assert oct(rays.stat().st_mode)[-3:] == "700"
        rays.rmdir()


def test_all_nodes_start_ray_with_one_token_and_the_head_trains(job: Job) -> None:
    code, output = job.run("run.yaml", "steps=3", "prompts.column=a b")
    assert (code, output) == (0, "")
    address = f"10.0.0.7:{20_000 + job.number % 10_000}"  # not the name's loopback address
    assert job.record("ray").startswith(
        f"symmetric-run --address {address} --min-nodes 2 --num-cpus=24 --num-gpus=8 "
        f"--object-store-memory={300 << 20} -- "
    )
    assert job.record("python") == (
        f"-P -m ppo_ray train run.yaml steps=3 prompts.column=a b ray.address={address} resume=auto"
    )
    assert "--cpus-per-task=24" in job.record("srun")
    environment = dict(line.split("=", 1) for line in job.record("environment").splitlines())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert int(environment["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) == 600
    assert job.record("mode") == "600"
    assert len(job.record("token")) == 64
    assert job.record("scontrol") is None


def test_the_drivers_exit_code_is_the_jobs(job: Job) -> None:
    assert job.run("run.yaml", DRIVER_DOES="3")[0] == 3
    assert job.record("scontrol") is None


def test_near_the_time_limit_the_driver_alone_is_told_and_the_job_is_requeued(job: Job) -> None:
    assert job.tell(signal.SIGUSR1, DRIVER_DOES="run") == 143
    assert job.record("driver_was_told") is not None
    assert job.record("ray_was_told") is None
    assert job.record("scontrol") == f"requeue {job.number}"


def test_who_stops_it_gets_no_other_try(job: Job) -> None:
    assert job.tell(signal.SIGTERM, DRIVER_DOES="run") == 143
    assert job.record("driver_was_told") is not None
    assert job.record("ray_was_told") is None
    assert job.record("scontrol") is None


def test_it_is_not_requeued_for_ever(job: Job) -> None:
    assert job.tell(signal.SIGUSR1, DRIVER_DOES="run", SLURM_RESTART_COUNT="50") == 143
    assert job.record("scontrol") is None


def test_a_ray_that_does_not_start_is_a_failure(job: Job) -> None:
    code, output = job.run("run.yaml", RAY_DOES="fail")
    assert code == 1
    assert "Ray did not start, see above" in output
    assert job.record("python") is None


def test_a_ray_that_still_starts_is_ended(job: Job) -> None:
    assert job.tell(signal.SIGUSR1, RAY_DOES="hang") == 143
    assert job.record("python") is None
    assert job.record("scontrol") == f"requeue {job.number}"


def test_rays_files_are_in_no_folder_that_somebody_else_chose(job: Job) -> None:
    planted = Path(f"/tmp/ppo-ray-{job.number}")
    (job.folder / "mine").mkdir()
    planted.symlink_to(job.folder / "mine")  # it is this user's own folder, and yet not one for Ray
    try:
        code, _ = job.run("run.yaml")
    finally:
        planted.unlink()
    assert code == 1 and job.record("ray") is None


def test_a_folder_that_is_there_already_is_closed_to_others(job: Job) -> None:
    Path(f"/tmp/ppo-ray-{job.number}").mkdir(mode=0o755)  # the fixture looks at its mode
    assert job.run("run.yaml")[0] == 0


def test_what_is_missing_is_said_at_once(job: Job) -> None:
    code, output = job.run()
    assert (code, output.split(" CONFIG")[0]) == (2, "usage: sbatch cluster/slurm.sbatch")
    (job.folder / "bin" / "ray").unlink()
    code, output = job.run("run.yaml")
    assert (code, output.split(":")[0]) == (2, "ray is not on PATH")


def test_what_slurm_is_told() -> None:
    told = {line.split()[1] for line in TEXT.splitlines() if line.startswith("#SBATCH")}
    assert {"--exclusive", "--ntasks-per-node=1", "--signal=B:USR1@600", "--requeue", "--open-mode=append"} <= told


def test_shellcheck_has_nothing_to_say() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert lint("shellcheck", SCRIPT) == ""
    assert "SC2086" in lint("shellcheck", text="#!/bin/bash\nkill $1\n")
