"""`ppo-ray submit`: a run is checked, sent as a job to a Ray cluster, and followed to its end."""

import math
import os
import shlex
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError, Interrupted
from ppo_ray.jobs.request import (
    JobRequest,
    describe_exposure,
    describe_unsent_tokens,
    head_problems,
    request_problems,
)
from ppo_ray.preflight import refuse
from ppo_ray.run.folder import config_text

if TYPE_CHECKING:
    from ppo_ray.jobs.package import Package
    from ppo_ray.jobs.server import JobServer

_CONFIG_FILE = "submitted.yaml"
_STOP_MARGIN_S = 10  # that Ray waits beyond the run's own limit: actors are closed, the process ends

Say = Callable[[str], object]
"""Shows a line to whoever submits."""


def load_job_config(path: Path, overrides: list[str]) -> Config:
    """Read the config of a job: the run goes on if it began already, unless the user says otherwise.

    Raises:
        InputError: as `load_config`.
    """
    config = load_config(path, overrides)
    return config if "resume" in config.model_fields_set else config.model_copy(update={"resume": "auto"})


def submit(request: JobRequest, wait: bool, write: Callable[[str], object], say: Say) -> int:
    """Submit a run and, if asked to, follow it to its end.

    Sets `RAY_AUTH_MODE` (to token, unless it is set) and `RAY_API_SERVER_ADDRESS` of this process: what Ray reads.

    Args:
        request: what is submitted.
        wait: whether to follow its log and to return its exit code.
        write: takes the log, piece by piece.
        say: shows what was sent, and how the job ended.

    Returns:
        The job's exit code, 143 if it was stopped; 0 if it was not waited for.

    Raises:
        InputError: something cannot be right; nothing was sent.
        JobError: the cluster did not take the job, or does not answer any more.
        Interrupted: Ctrl-C; the job goes on.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's clients do not turn it on, and read it when imported
    os.environ["RAY_API_SERVER_ADDRESS"] = request.address  # what is set there would win over any argument
    package, server = _check(request, say)
    _send(request, package, server)
    say(f"submitted {request.name} to {request.address}: the config{_describe_files(package)}")
    if not wait:
        say(_next_steps(request))
        return 0
    say(f"its log follows; Ctrl-C leaves it alone, the job goes on. To stop it: {_ray_command('stop', request)}")
    try:
        end = server.follow(request.name, write)
    except KeyboardInterrupt:
        say(f"\nthe job {request.name} goes on\n{_next_steps(request)}")
        raise Interrupted(signal.SIGINT) from None
    say(end.message)
    return end.exit_code


def _check(request: JobRequest, say: Say) -> "tuple[Package, JobServer]":
    """Check a request here and at the head, and report all that is wrong at once.

    Raises:
        InputError: a line for everything that cannot be right.
    """
    from ppo_ray.jobs.package import Package
    from ppo_ray.jobs.server import JobServer

    problems: list[str] = []
    package, server = Package(), None
    try:
        package = Package.scan(request.working_dir) if request.working_dir else package
        problems += filter(None, [package.problem()])
    except InputError as error:
        problems.append(str(error))
    unreachable = list(head_problems(request, os.environ))
    problems += [*unreachable, *request_problems(request, os.environ, package.holds)]
    if not unreachable:
        try:
            server = JobServer(request.address)
            if server.knows(request.name):
                problems.append(f"--name={request.name}: the cluster has had a job of that name; give another, or none")
        except InputError as error:
            problems.append(str(error))
    refuse(problems, "nothing was sent")
    assert server is not None  # or there was a problem
    if warning := describe_exposure(request.address):
        say(warning)
    for warning in describe_unsent_tokens(request):
        say(warning)
    if shortage := server.shortage(request.config):
        say(f"warning: the cluster is too small now, and the job will be refused unless it grows: {shortage}")
    return package, server


def _send(request: JobRequest, package: "Package", server: "JobServer") -> None:
    """Send the folder with the config that was checked, and start the job."""
    patience = math.ceil(request.config.ray.stop_timeout_s) + _STOP_MARGIN_S
    variables = {name: os.environ[name] for name in request.variables}
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "package.zip")
        package.write(archive, {_CONFIG_FILE: config_text(request.config)})
        server.submit(
            request.name,
            f"python -P -m ppo_ray train {_CONFIG_FILE}",
            archive,
            {**variables, "RAY_JOB_STOP_WAIT_TIME_S": str(patience)},  # Ray's own 3 s are too short for a checkpoint
        )


def _describe_files(package: "Package") -> str:
    if package.folder is None:
        return ""
    return f" and {len(package.files):,} files of {package.folder}, {package.size / 2**20:.1f} MiB"


def _next_steps(request: JobRequest) -> str:
    return "\n".join(
        (
            f"  follow it:                      {_ray_command('logs --follow', request)}",
            f"  stop it, with a checkpoint:     {_ray_command('stop', request)}",
            "  go on with it:                  submit it again (a --name must be a new one)",
        )
    )


def _ray_command(command: str, request: JobRequest) -> str:
    mode = os.environ["RAY_AUTH_MODE"]
    return f"RAY_AUTH_MODE={mode} ray job {command} --address {shlex.quote(request.address)} {request.name}"
