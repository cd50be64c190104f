"""A process that forks the workers of a private Ray, so that what they all need is imported once.

torch and transformers take seconds of a core to import, and memory. The server imports them while the driver checks its
inputs. A worker that is forked off it has them already, and shares their memory with the others. Ray starts a worker by
`setup_worker.py`, which asks the server for it, or becomes the worker itself if the server forks none.

`python -P -m ppo_ray.actors.fork_server` is the server. It imports no Ray, which reads its
environment once per process. It forks only while it has one thread: a lock that another thread holds would stay locked
in the worker for ever.
"""

import contextlib
import json
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from ppo_ray.actors.setup_worker import FORK_SERVER, OOM_SCORE, SIZE_BYTES
from ppo_ray.machine import import_ahead
from ppo_ray.plan.demand import CPU_ENVIRONMENT

MODULES = ("ppo_ray.models.loading",)
"""What the server imports: torch, transformers, and nothing that starts a thread or imports Ray."""
_ENVIRONMENT = {
    **CPU_ENVIRONMENT,
    "OMP_NUM_THREADS": "1",  # with more, or if the other is more, numpy starts threads
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # a process that has looked at a GPU cannot be forked
}
"""Of the server; a worker has its own."""
_servers: list[subprocess.Popen[bytes]] = []
"""Of this process: one, or none."""
_AT_ONCE = "--at-once"
_REQUEST_S = 10.0


@contextlib.contextmanager
def fork_server(at_once: bool = False, modules: Sequence[str] = MODULES) -> Iterator[None]:
    """Run a server for the length of a block; a private Ray that starts in the block uses it.

    The server and the workers that it forked are killed at the end of the block, and when this process ends. If this
    process has a server already, that one is used. If none can start, for want of disk, memory or a path that is short
    enough for a socket, the workers start by themselves.

    Args:
        at_once: whether it imports now, and not when the first worker is asked for.
        modules: that it imports.
    """
    if _servers:
        yield
        return
    before = os.environ.pop(FORK_SERVER, None)  # of another process
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            place = os.environ.get("RAY_TMPDIR") or "/tmp"  # as Ray's own sockets; no other account enters the folder
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ppo-ray-fork-", dir=place, ignore_cleanup_errors=True)
            )
            _servers.append(_start(folder, at_once, modules))
            stack.callback(_end)
            os.environ[FORK_SERVER] = f"{folder}/socket"
        try:
            yield
        finally:
            os.environ.pop(FORK_SERVER, None)
            if before:
                os.environ[FORK_SERVER] = before


def _start(folder: str, at_once: bool, modules: Sequence[str]) -> subprocess.Popen[bytes]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(128)
        command = [sys.executable, "-P", "-m", __name__, *([_AT_ONCE] if at_once else [])]
        return subprocess.Popen(
            [*command, folder, str(listener.fileno()), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # its workers have files of their own
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ENVIRONMENT},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


def find_workers() -> list[psutil.Process]:
    """Return the workers that were forked off this process's server and live."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [worker for server in _servers for worker in psutil.Process(server.pid).children()]
    return []


def _end() -> None:
    """Kill the server and the workers that it forked."""
    workers, server = find_workers(), _servers.pop()
    server.kill()
    server.communicate()
    kill(workers)


class _Server:
    """The server: it listens and forks."""

    def __init__(self, listener: socket.socket, modules: Sequence[str]) -> None:
        self._listener, self._modules = listener, modules
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for its workers

    def serve(self) -> dict[str, Any] | None:
        """Fork a worker for each connection, until the driver closes this process's input or ends.

        It ends earlier if what was imported has started a thread: then no worker waits for it in vain.

        Returns:
            In a worker, what it is to be. In the server, at its end: None.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while _has_one_thread() and sys.stdin not in (ready := [key.fileobj for key, _ in selector.select()]):
                if self._listener in ready:
                    connection, _ = self._listener.accept()
                    with connection, contextlib.suppress(OSError, ValueError):  # who asked may have been killed
                        if (request := self._answer(connection)) is not None:
                            return request
        kill(psutil.Process().children())
        return None

    def _answer(self, connection: socket.socket) -> dict[str, Any] | None:
        """Fork a worker, if who asked still waits and there is one thread; returns, in the worker, what it is to be."""
        connection.settimeout(_REQUEST_S)
        size, files, _, _ = socket.recv_fds(connection, SIZE_BYTES, 3)
        try:
            with connection.makefile("rb") as stream:
                request: dict[str, Any] = json.loads(stream.read(int.from_bytes(size)))
            import_ahead(*self._modules)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.recv(1)  # nothing more is sent: only an end can be read
                return None
            if not _has_one_thread():
                return None
            if os.fork() == 0:
                self._take_over(connection, files, request)
                return request
            connection.send(b"+")
            return None
        finally:
            for file in files:
                os.close(file)

    def _take_over(self, connection: socket.socket, files: Sequence[int], request: dict[str, Any]) -> None:
        """Give a process that was just forked the files and limits of the one that asked for it, or end it."""
        try:
            os.setpgrp()  # Ray kills a worker with all of its group
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._listener.close()
            os.dup(connection.fileno())  # `setup_worker.py` waits until this process's end closes it
            for place, file in enumerate(files):
                os.dup2(file, place)
        except OSError:
            os._exit(1)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
            Path(OOM_SCORE).write_text(request["oom_score"], encoding="ascii")


def _has_one_thread() -> bool:
    return len(os.listdir("/proc/self/task")) == 1


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill those of these processes that still live."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _become(request: dict[str, Any]) -> None:
    """Run a worker's script, as if Python had been started for it."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which it read when it was imported
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(arguments: list[str]) -> None:
    """Be the server.

    Args:
        arguments: `--at-once` to import now, the folder of the socket, the number of its file, and the modules.
    """
    at_once = arguments[0] == _AT_ONCE
    folder, listener, *modules = arguments[at_once:]
    server = _Server(socket.socket(fileno=int(listener)), modules)
    if at_once:
        import_ahead(*modules)
    if (request := server.serve()) is not None:
        _become(request)
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
