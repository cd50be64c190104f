"""What `ppo-ray submit` makes of a job server's answers; the server is a fake one, all else is real."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from ppo_ray.config import load_config
from ppo_ray.errors import InputError, JobError
from ppo_ray.jobs import server as jobs
from ppo_ray.jobs import submit as submission
from ppo_ray.jobs.request import JobRequest
from tests.fake_head import FakeHead, fake_head

OPTIONS = ("output_dir=/shared/run", "model.path=org/model", "prompts.path=imdb", "reward.path=/models/judge")
LOG = "".join(f"step {number}\n" for number in range(20))
TOKEN = "s" * 40


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look again at once, and leave this process' environment as it was."""
    monkeypatch.setattr(jobs, "_LONGEST_PAUSE_S", 0.01)
    for name in ("RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "elsewhere")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def head() -> Iterator[FakeHead]:
    with fake_head(log=LOG) as head:
        yield head


@pytest.fixture
def film_config(tmp_path: Path) -> Path:
    path = tmp_path / "films.yaml"
    path.write_text("output_dir: /shared/run\nmodel: {path: org/model}\nprompts: {path: imdb}\nreward: {path: /j}\n")
    return path


def submit(head: FakeHead, *overrides: str, wait: bool = True, **fields) -> tuple[int, str, str]:
    config = load_config(None, [*OPTIONS, *overrides])
    request = JobRequest(config, **{"address": head.address, "name": "films", **fields})
    log, said = io.StringIO(), []
    code = submission.submit(request, wait, log.write, said.append)
    return code, log.getvalue(), "\n".join(said)


def test_what_is_sent_and_what_is_said(head: FakeHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "judge.py").write_text("x")
    code, log, said = submit(head, "steps=7", "ray.stop_timeout_s=30.5", working_dir=tmp_path, variables=("HF_TOKEN",))
    assert (code, log) == (0, LOG)
    (job,) = head.submitted
    assert job["submission_id"] == "films"
    environment = job["runtime_env"]
    assert environment["env_vars"] == {"HF_TOKEN": "hf_secret", "RAY_JOB_STOP_WAIT_TIME_S": "41"}
    assert environment["working_dir"].startswith("gcs://")
    with ZipFile(io.BytesIO(head.packages[0])) as archive:
        assert archive.namelist() == ["judge.py", "submitted.yaml"]
        archive.extract("submitted.yaml", tmp_path)
    *start, file = shlex.split(job["entrypoint"])
    assert start == ["python", "-P", "-m", "ppo_ray", "train"]
    assert load_config(tmp_path / file, []) == load_config(None, [*OPTIONS, "steps=7", "ray.stop_timeout_s=30.5"])
    assert f"submitted films to {head.address}: the config and 1 files of {tmp_path}, 0.0 MiB" in said
    assert said.endswith("job films succeeded")
    assert f"ray job stop --address {head.address} films" in said
    assert "hf_secret" not in said and TOKEN not in said


def test_a_job_that_is_not_waited_for(head: FakeHead) -> None:
    code, log, said = submit(head, wait=False)
    assert (code, log) == (0, "")
    assert f"RAY_AUTH_MODE=token ray job logs --follow --address {head.address} films" in said


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ({"status": "FAILED", "driver_exit_code": 2}, 2, "failed with exit code 2"),
        ({"status": "FAILED", "driver_exit_code": -9}, 137, "failed with exit code 137"),
        ({"status": "FAILED", "message": "no such image"}, 1, "failed: no such image"),
        ({"status": "STOPPED"}, 143, "was stopped; submit it again to go on"),
    ],
)
def test_the_exit_code_is_the_jobs(head: FakeHead, state: dict, code: int, said: str) -> None:
    head.states = [state]
    assert submit(head)[0] == code
    assert said in submit(head)[2]


def test_the_end_of_the_stream_is_not_the_end_of_the_job(head: FakeHead) -> None:
    """Three connections break, the fourth brings all from the start again: everything is written once."""
    head.streams = [LOG[:10], "", LOG[:50]]
    head.states = [{"status": "PENDING"}, *[{"status": "RUNNING"}] * 2, {"status": "FAILED", "driver_exit_code": 3}]
    assert submit(head)[:2] == (3, LOG)


def test_what_came_after_the_stream_broke_is_fetched(head: FakeHead) -> None:
    head.streams = [LOG[:10]]
    assert submit(head)[:2] == (0, LOG)


def test_a_silent_stream_is_no_dead_job(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is asked for; it goes on being read."""
    monkeypatch.setattr(jobs, "_SILENCE_S", 0.02)
    head.silent, asked = True, []

    def ask(self: object, name: str) -> None:
        asked.append(name)
        if len(asked) > 3:
            raise ZeroDivisionError

    monkeypatch.setattr(jobs._Client, "get_job_info", ask)
    with pytest.raises(ZeroDivisionError):
        submit(head)
    assert len(asked) == 4


def test_a_head_that_is_gone_is_not_waited_for_for_ever(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.1)

    def gone(self: object, name: str) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(jobs._Client, "get_job_info", gone)
    with pytest.raises(JobError, match=r"the head has not answered for 0\.1 s \(refused\); the job may go on"):
        submit(head)


def test_a_job_that_is_not_taken(head: FakeHead) -> None:
    head.refusal = "Traceback (most recent call last):\n  File x\nValueError: No available agent\n.\n"
    with pytest.raises(JobError, match=f"{head.address} did not take the job: ValueError: No available agent"):
        submit(head)


def test_what_is_short_is_a_warning(head: FakeHead) -> None:
    """An autoscaler may add it; the job itself is refused where it does not."""
    head.cpus = 2.0
    code, _, said = submit(head, "rollout.workers=8", "rollout.gpus=1", "rollout.threads=2")
    assert code == 0
    assert "6.333 CPUs needed, the cluster has 2" in said and "8 GPUs needed, the cluster has 0" in said


def refused(head: FakeHead, *overrides: str, **fields) -> list[str]:
    with pytest.raises(InputError) as caught:
        submit(head, *overrides, **fields)
    assert head.submitted == head.packages == []
    return [line.strip() for line in str(caught.value).splitlines()]


def test_all_that_is_wrong_is_said_at_once(head: FakeHead, tmp_path: Path) -> None:
    head.names = ("films",)
    found = refused(head, "output_dir=x", working_dir=tmp_path / "nowhere", variables=("NO_SUCH",))
    assert found[0] == "4 problems, nothing was sent"
    assert [line.partition("=")[0] for line in found[1:]] == [
        "--working-dir",
        "--env NO_SUCH: is not set here; export it, or leave it out",
        "output_dir",
        "--name",
    ]


def test_nothing_answers() -> None:
    (_, line) = refused(FakeHead(address="http://127.0.0.1:9"))
    assert line.startswith("--address=http://127.0.0.1:9: no Ray dashboard answers there (ConnectionError)")


@pytest.mark.parametrize(("failure", "kind"), [("error", "RuntimeError"), ("hang up", "ConnectionError")])
def test_a_head_that_cannot_list_its_jobs(head: FakeHead, failure: str, kind: str) -> None:
    head.list_failure = failure
    heading, *found = refused(head, "output_dir=runs/x")
    assert heading == "2 problems, nothing was sent"
    assert found[0].startswith("output_dir=runs/x: must be absolute")
    assert found[1].startswith(f"--address={head.address}: the head does not say which jobs it has had ({kind}: ")
    assert "no store" not in found[1]  # the traceback is not shown


def command(config: Path, address: str, *options: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "ppo_ray", "submit", str(config), "--address", address, *options],
        env=environment | {"HOME": "/nowhere", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_token_goes_with_every_request_and_is_never_shown(head: FakeHead, film_config: Path) -> None:
    """In processes of their own: Ray reads how to authenticate when it is imported."""
    head.token = TOKEN
    head.states = [{"status": "FAILED", "driver_exit_code": 5}]
    elsewhere = "http://127.0.0.1:9"  # what is typed wins over the environment
    processes = [
        command(film_config, head.address, RAY_AUTH_TOKEN=TOKEN, RAY_API_SERVER_ADDRESS=elsewhere),
        command(film_config, head.address, RAY_AUTH_TOKEN="w" * 40),
        command(film_config, head.address, RAY_AUTH_MODE="disabled"),
    ]
    outputs = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    (log, said, code), (_, wrong, wrong_code), (_, none, none_code) = outputs
    assert (code, wrong_code, none_code) == (5, 2, 2)
    assert LOG in log and "failed with exit code 5" in log and said == ""
    (job,) = head.submitted
    assert job["submission_id"].startswith("films-20")
    assert "HTTP 403" in wrong and "RAY_AUTH_TOKEN" in wrong
    assert "HTTP 401" in none
    assert not any(secret in text for text in (log, said, wrong, none) for secret in (TOKEN, "w" * 40))
    with ZipFile(io.BytesIO(head.packages[0])) as archive:
        assert b"\nresume: auto\n" in archive.read("submitted.yaml")


def test_ctrl_c_leaves_the_job_alone(head: FakeHead, film_config: Path) -> None:
    head.states, head.silent = [{"status": "RUNNING"}], True
    process = command(film_config, head.address, "--name", "films", RAY_AUTH_TOKEN=TOKEN)
    assert process.stdout is not None
    read = ""
    while "step 19" not in read:
        read += process.stdout.readline()
        assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert (process.returncode, errors) == (130, "interrupted by SIGINT\n")
    assert "the job films goes on" in output and "ray job stop" in output


def test_whoever_says_resume_is_heard(film_config: Path) -> None:
    assert submission.load_job_config(film_config, []).resume == "auto"
    assert submission.load_job_config(film_config, ["resume=never"]).resume == "never"
