"""A process of an arm: bounded in time, watched, its output in a file; nothing of it is left behind."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.compare.memory import PeakMemory
from ppo_ray.errors import WorkerError

_POLL_S = 0.5
_LAST_LINES = 12


def run(
    command: list[str], log: Path, limit_s: float, looked: Callable[[], None], environment: dict[str, str]
) -> PeakMemory:
    """Run a command to its end and return what memory it took.

    Args:
        command: and its arguments.
        log: gets all that it writes.
        limit_s: longest time, seconds.
        looked: called about twice a second.
        environment: variables to add; OMP_NUM_THREADS of this process is not handed on.

    Raises:
        WorkerError: it failed or took too long; says where its output is, and the last of it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=inherited | environment, start_new_session=True
        )
        memory = PeakMemory(process.pid)
        memory.start()
        deadline = time.monotonic() + limit_s
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise WorkerError(_message(f"took more than {limit_s:.0f} s", command, log))
                time.sleep(_POLL_S)
                looked()
        finally:
            memory.stop()
            if process.poll() is None:
                memory.kill()
                process.wait(timeout=30)
    if process.returncode:
        raise WorkerError(_message(f"ended with {process.returncode}", command, log))
    return memory


def _message(what: str, command: list[str], log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"{' '.join(command)}\n{what}; its output is in {log}, and ends with", *lines])
