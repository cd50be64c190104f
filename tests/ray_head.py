"""A Ray head as a user starts it, on ports of its own, with token authentication."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PORT_OPTIONS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """A running head, and the environment in which a user's shell talks to it."""

    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("ray")), *arguments]
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=timeout)


@contextlib.contextmanager
def ray_head(environment: dict[str, str], num_cpus: int = 6) -> Iterator[Head]:
    """Start a head whose session lies in the environment's RAY_TMPDIR; nothing of it stays.

    A few seconds at most are given to each of its parts to end; `ray stop` would end every Ray of the machine.
    """
    ports = dict(zip(_PORT_OPTIONS, _free_ports(len(_PORT_OPTIONS)), strict=True))
    ours = {
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
    }
    options = [f"--{option}={port}" for option, port in ports.items()]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
    local = ("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true")
    sizes = (f"--num-cpus={num_cpus}", f"--object-store-memory={200 << 20}")
    process = subprocess.Popen(
        [*command, *local, *sizes, f"--temp-dir={environment['RAY_TMPDIR']}/head"],
        env=ours,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        _wait_until_it_answers(process, address, ours["RAY_AUTH_TOKEN"])
        yield Head(address, ours | {"RAY_API_SERVER_ADDRESS": address})
    finally:
        process.terminate()  # of `ray start --block`: ends its parts
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_it_answers(process: subprocess.Popen[bytes], address: str, token: str, seconds: float = 120) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + seconds
    while True:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(request, timeout=10) as answer,
        ):
            if answer.status == 200:
                return
        assert process.poll() is None, f"`ray start` ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{address} did not answer within {seconds} s"
        time.sleep(0.5)
