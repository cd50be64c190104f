"""The Ray session of a run: a private one on this machine, or a connection to a cluster."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from typing import NoReturn

import psutil
import ray

from ppo_ray.config import RayConfig
from ppo_ray.errors import InputError, WorkerError
from ppo_ray.stopping import handle_signals

_EXIT_S = 10.0
_REACH_S = 20.0


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to Ray for the length of a block.

    Without an address a private single-node Ray is started, with token authentication and without a dashboard, and is
    stopped at the end, whatever ended the block. Under `ray job submit`, or with an address, the block uses that
    cluster and disconnects at its end. If the process is connected to Ray already, that connection is used and kept.

    Raises:
        InputError: there is no Ray at `ray.address`.
        WorkerError: a private Ray does not start; nothing of it is left.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = psutil.Process().children()
    started: list[psutil.Process] = []
    try:
        if config.is_private:
            try:
                _start_private(config)
            finally:
                started = [process for process in psutil.Process().children() if process not in before]
        else:
            _connect(config.address)
        # Ray has set handlers of its own
        with handle_signals(config.stop_timeout_s, lambda code: _end_at_once(started, code)):
            yield
    finally:
        _shut_down(started)


def _shut_down(started: list[psutil.Process]) -> None:
    """Disconnect; wait for every process of a Ray that was started here, and kill those that remain."""
    processes = started + [child for process in started for child in _descendants(process)]
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_EXIT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_EXIT_S)


def _end_at_once(started: list[psutil.Process], code: int) -> NoReturn:
    """End this process without closing anything; kill a Ray that was started here (another one ends our actors)."""
    for process in [*started, *(child for parent in started for child in _descendants(parent))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(code)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _start_private(config: RayConfig) -> None:
    # Ray turns token authentication on for a cluster it starts; with a token of its own the run leaves none in a file.
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's default of 15 lets anything else on this machine go before the run's own work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=config.object_store_mib << 20,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    except Exception as error:  # Ray has no kind of its own for this
        raise WorkerError(
            f"a Ray of its own did not start on this machine: {error} Ray gives it 30 s, which a machine that is busy, "
            "or short of memory or disk, may not hold; look at what else runs here, and start again"
        ) from error


def _connect(address: str | None) -> None:
    """Connect to a running cluster, or to the job's own."""
    found = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _reach(found)
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(
            f"ray.address={address!r}: no Ray cluster answers there ({error}). Start one with `ray start --head`, "
            "export RAY_AUTH_MODE=token and its token as RAY_AUTH_TOKEN, or leave ray.address empty for a private Ray "
            "on this machine."
        ) from error


def _reach(address: str) -> None:
    """Open a connection to `host:port` and close it again: Ray itself tries for minutes where nobody listens.

    Raises:
        OSError: nobody listens there, or no answer came in time.
    """
    host, _, port = address.rpartition(":")
    if "/" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
