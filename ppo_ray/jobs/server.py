"""A client of Ray's job server at the head of a cluster: it asks for resources, sends jobs and follows them.

`RAY_AUTH_MODE` must be set before this module is imported: Ray reads it once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from ppo_ray.config import Config
from ppo_ray.errors import InputError, JobError, first_line
from ppo_ray.plan import ClusterShape, Node, make_request
from ppo_ray.plan.assign import assign

_ANSWER_S = (10, 120)  # to connect; between two bytes of an answer: an upload is unpacked before it is answered
_SILENCE_S = 60.0  # of a log, before the job's state is asked for
_PATIENCE_S = 300.0  # without an answer of the head, before a job is no longer followed
_LONGEST_PAUSE_S = 30.0  # between two looks at a log that cannot be followed
_MOST_NODES = 10_000

_UNREACHABLE = (OSError, RuntimeError, aiohttp.ClientError, RayError)
"""Errors of Ray's SDK when the head does not answer, or answers wrongly; those of `requests` are `OSError`."""


@dataclass(frozen=True)
class End:
    """The end of a job."""

    exit_code: int
    """Of the job's own process, as shells have it; 143 if the job was stopped."""
    message: str


class JobServer:
    """The job server at an address; every request has a time limit."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: of the dashboard, e.g. `http://10.0.0.1:8265`.

        Raises:
            InputError: nothing answers there, what answers is no Ray, or it refuses the token.
        """
        for name in ("dashboard_sdk", "job.sdk"):  # they log every upload and closed socket
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        self._address = address
        try:
            self._client = _Client(address)
        except AuthenticationError as error:
            raise InputError(f"--address={address}: {_refusal(str(error))}") from error
        except (*_UNREACHABLE, ValueError, KeyError) as error:
            raise InputError(
                f"--address={address}: no Ray dashboard answers there ({type(error).__name__}); give the head's, e.g. "
                "http://HOST:8265, and see that it can be reached from here (ssh -L 8265:127.0.0.1:8265 HOST)"
            ) from error

    def knows(self, name: str) -> bool:
        """Say whether there is, or was, a job of that name: Ray never gives a name twice.

        Raises:
            InputError: the head does not answer, or not as it should.
        """
        try:
            return any(job.submission_id == name for job in self._client.list_jobs())
        except (*_UNREACHABLE, ValueError) as error:
            raise InputError(
                f"--address={self._address}: the head does not say which jobs it has had ({type(error).__name__}: "
                f"{first_line(error)}); see that it is well, and try again"
            ) from error

    def shortage(self, config: Config) -> str | None:
        """Return which actors have no room on the nodes that the cluster has now; None if all have."""
        try:
            nodes = list_nodes(self._address, [("state", "=", "ALIVE")], limit=_MOST_NODES, timeout=_ANSWER_S[0])
        except (RayStateApiException, *_UNREACHABLE) as error:
            return f"what the cluster has could not be found out ({type(error).__name__})"
        there = tuple(
            Node(node.node_ip, node.resources_total.get("CPU", 0.0), int(node.resources_total.get("GPU", 0)))
            for node in nodes
        )
        shortages = assign(make_request(config), ClusterShape(there)).shortages
        return "; ".join(map(str, shortages)) or None

    def submit(self, name: str, entrypoint: str, package: Path, variables: Mapping[str, str]) -> None:
        """Send a package and start a job in it.

        Args:
            name: of the job, new to the cluster.
            entrypoint: a shell command.
            package: a zip archive of the job's working directory.
            variables: environment of the job and its actors; everybody who may list the cluster's jobs can read it.

        Raises:
            JobError: the server does not take it.
        """
        environment = {"working_dir": str(package), "env_vars": dict(variables)}
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=environment)
        except _UNREACHABLE as error:
            lines = [line for line in str(error).splitlines() if line.strip(" .")]  # of a traceback the last one counts
            raise JobError(f"{self._address} did not take the job: {(lines or [type(error).__name__])[-1]}") from error

    def follow(self, name: str, write: Callable[[str], object]) -> End:
        """Write a job's log as it grows, until the job has ended.

        The end of the log's stream is not taken for the end of the job: connections break, heads restart.

        Raises:
            JobError: the head did not answer for five minutes.
        """
        return asyncio.run(self._follow(name, write))

    async def _follow(self, name: str, write: Callable[[str], object]) -> End:
        log, pause = _Log(write), 1.0
        while True:
            before = log.written
            with contextlib.suppress(*_UNREACHABLE):
                await self._tail(name, log)
            try:
                details = self._ask(name, log)
                if details.status.is_terminal():
                    with contextlib.suppress(*_UNREACHABLE):
                        log.add(self._client.get_job_logs(name), 0)
                    return _end(name, details)
            except _UNREACHABLE as error:
                if time.monotonic() - log.heard > _PATIENCE_S:
                    raise JobError(
                        f"the head has not answered for {_PATIENCE_S:g} s ({error}); the job may go on or be lost with "
                        "it: see `ray job list`, and submit it again to go on from its newest checkpoint"
                    ) from error
            pause = 1.0 if log.written > before else min(2 * pause, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    def _ask(self, name: str, log: "_Log") -> JobDetails:
        """Ask the head for the job's state, and note when it answered."""
        details = self._client.get_job_info(name)
        log.heard = time.monotonic()
        return details

    async def _tail(self, name: str, log: "_Log") -> None:
        """Write the log until its stream ends, or is silent and the head does not answer."""
        async with contextlib.aclosing(self._client.tail_job_logs(name)) as chunks:
            position = 0  # each stream begins at the log's first character
            while (chunk := await self._next(chunks, name, log)) is not None:
                log.add(chunk, position)
                position += len(chunk)

    async def _next(self, chunks: AsyncIterator[str], name: str, log: "_Log") -> str | None:
        """Wait for the next piece of a log as long as the head answers; None: the stream has ended."""

        async def arrive() -> str | None:
            return await anext(chunks, None)

        arriving = asyncio.ensure_future(arrive())
        try:
            while not (await asyncio.wait({arriving}, timeout=_SILENCE_S))[0]:
                self._ask(name, log)
            return arriving.result()
        finally:
            arriving.cancel()
            await asyncio.wait({arriving})


class _Client(JobSubmissionClient):
    """Ray's own client, with a time limit: without one a request to a host that is gone waits for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": _ANSWER_S, **options})


class _Log:
    """A log that is written once, although each stream of it begins anew."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.written = 0  # characters
        self.heard = time.monotonic()
        """When the head last sent something new, or the job's state."""

    def add(self, text: str, position: int) -> None:
        """Write what is new of a text that begins at that character of the log."""
        if fresh := text[max(0, self.written - position) :]:
            self._write(fresh)
            self.heard = time.monotonic()
            self.written = position + len(text)


def _refusal(answer: str) -> str:
    if "Forbidden" in answer or "invalid" in answer:
        return (
            "the head refuses the token (HTTP 403): it is another cluster's, or an old one. Ray takes RAY_AUTH_TOKEN, "
            "else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token: put the cluster's own there"
        )
    return "the head wants a token (HTTP 401) and got none; RAY_AUTH_MODE must be token here too"


def _end(name: str, details: JobDetails) -> End:
    if details.status == JobStatus.SUCCEEDED:
        return End(0, f"job {name} succeeded")
    if details.status == JobStatus.STOPPED:
        return End(143, f"job {name} was stopped; submit it again to go on")
    code = details.driver_exit_code
    if code is None:
        return End(1, f"job {name} failed: {details.message}")
    code = 128 - code if code < 0 else code  # ended by a signal
    return End(code, f"job {name} failed with exit code {code}")
