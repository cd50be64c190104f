"""The Ray session of a run: a private one on this machine, or a connection to a cluster."""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
import ray
from ray._private import node as ray_node

from ppo_ray.actors import setup_worker
from ppo_ray.actors.fork_server import find_workers, fork_server, kill
from ppo_ray.actors.setup_worker import OF_RAY
from ppo_ray.config import RayConfig
from ppo_ray.errors import InputError, Interrupted, WorkerError
from ppo_ray.machine import count_cpus
from ppo_ray.stopping import handle_signals

_EXIT_S = 10.0
_REACH_S = 20.0


class _Node(ray_node.Node):
    """Ray's node without what no private Ray needs: autoscaler, dashboard, and the process that reads logs.

    Each is a Python process that imports all of Ray, and the dashboard's start would be waited for.
    """

    def __init__(self, ray_params: Any, **options: Any) -> None:
        """Take Ray's parameters of a node, and say which processes are left out."""
        ray_params.update(no_monitor=True, include_log_monitor=False, setup_worker_path=setup_worker.__file__)
        super().__init__(ray_params, **options)

    def start_api_server(self, **options: Any) -> None:
        """Start no dashboard."""


@contextlib.contextmanager
def _nodes_of_ours() -> Iterator[None]:
    """Let `ray.init` make its node of our class for the length of a block."""
    before = ray_node.Node
    ray_node.Node = _Node
    try:
        yield
    finally:
        ray_node.Node = before


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to Ray for the length of a block.

    Without an address a private single-node Ray is started, without a dashboard, and is stopped at the end, whatever
    ended the block. Its token is new and known to its own processes alone, whatever the shell says of Ray's
    authentication. Its sockets, logs and code lie in a folder that no other account can enter. The folder is removed at
    the end; after an error it stays, for the logs that the error names. Under `ray job submit`, or with an address, the
    block uses that cluster and disconnects at its end. If the process is connected to Ray already, that connection is
    used and kept.

    Raises:
        InputError: there is no Ray at `ray.address`.
        WorkerError: a private Ray does not start; none of its processes is left.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not config.is_private:
        with _cluster(config):
            yield
        return
    with fork_server(), _private_ray(config):
        yield


@contextlib.contextmanager
def _cluster(config: RayConfig) -> Iterator[None]:
    """Connect to a running cluster for the length of a block."""
    try:
        _connect(config.address)
        # Ray has set handlers of its own
        with handle_signals(config.stop_timeout_s, os._exit):
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _private_ray(config: RayConfig) -> Iterator[None]:
    """Start a Ray of its own for the length of a block; see `ray_session`."""
    # Ray's sockets allow a path of 107 characters, and it makes a folder of its own below this one
    folder = tempfile.mkdtemp(prefix="ppo-ray-", dir=os.environ.get("RAY_TMPDIR") or "/tmp")
    before = psutil.Process().children()
    started: list[psutil.Process] = []

    def find_own() -> list[psutil.Process]:
        """Return Ray's processes, its workers among them."""
        return [*started, *(child for process in started for child in _descendants(process)), *find_workers()]

    try:
        with _own_environment():
            try:
                try:
                    _start_private(config, folder)
                finally:
                    started = [process for process in psutil.Process().children() if process not in before]
                with handle_signals(config.stop_timeout_s, lambda code: _end_at_once(find_own(), folder, code)):
                    yield
            finally:
                _shut_down(find_own())
    except (InputError, Interrupted):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Set what all processes of a private Ray inherit, for the length of a block.

    That is token authentication with a new token, which lies in no file; and NCCL on loopback, so that it listens to
    nobody on the network either. An interface that the shell names for NCCL is kept.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_TOKEN_PATH": None}
    own["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME", "=lo")
    own[OF_RAY] = str(Path(ray_node.__file__).parent / "workers" / "setup_worker.py")
    before = {name: os.environ.get(name) for name in own}
    _set_environment(own)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set environment variables (None unsets one), and let Ray read its mode and token anew: it keeps what it read."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _shut_down(processes: list[psutil.Process]) -> None:
    """Disconnect; wait for every process of a Ray that was started here, and kill those that remain."""
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_EXIT_S)
    kill(alive)
    psutil.wait_procs(alive, timeout=_EXIT_S)


def _end_at_once(processes: list[psutil.Process], folder: str, code: int) -> NoReturn:
    """End this process without closing anything; kill the Ray that was started here, and remove its folder."""
    kill(processes)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _start_private(config: RayConfig, folder: str) -> None:
    """Start a single-node Ray whose files lie in a folder, which is empty.

    Ray puts the folder that it is started from before all libraries in every worker, so a file there that is named like
    a library would run instead of it. `Worker` enters the run's own folder.
    """
    # Ray's default of 15 lets anything else on this machine go before the run's own work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # No actor of a run could use a process that Ray starts ahead, because each has an environment of its own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # By default objects that nobody needs stay for up to a second, in which the next weights take memory of their own.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    try:
        with contextlib.chdir(folder), _nodes_of_ours():
            ray.init(
                address="local",
                num_cpus=count_cpus(),
                include_dashboard=False,
                object_store_memory=config.object_store_mib << 20,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
                _temp_dir=f"{folder}/r",  # Ray opens this one to all accounts, but nobody gets past the one above
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
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):  # see _start_private
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
