"""The base of all actors: a control call that tells where an actor runs, even while it works."""

import contextlib
import os
from dataclasses import dataclass

import ray

from ppo_ray.imports import import_ahead
from ppo_ray.plan.demand import FOLDER_VARIABLE

CONTROL = {"control": 1}
"""`concurrency_groups` of every actor class: control calls have a thread of their own, beside the one that works."""


@dataclass(frozen=True)
class Whereabouts:
    """Where an actor runs."""

    pid: int
    node: str
    """IP address."""
    log: str
    """File on that node with the actor's output and errors."""

    def __str__(self) -> str:
        return f"pid {self.pid} on node {self.node}, log {self.log}"


class Worker:
    """The base class of all actors; subclasses are decorated with `ray.remote`."""

    def __init__(self, name: str) -> None:
        """Take the worker's name, e.g. `"rollout-0"`, and enter the run's folder; `setup` does the heavy work."""
        self._name = name
        with contextlib.suppress(OSError, KeyError):  # on another node there may be no such folder
            os.chdir(os.environ[FOLDER_VARIABLE])

    def import_ahead(self, *modules: str) -> None:
        """Import what `setup` will need, while other actors do so too."""
        import_ahead(*modules)

    @ray.method(concurrency_group="control")
    def whereabouts(self) -> Whereabouts:
        """Tell where the actor runs; answers as long as its process is alive and not stopped."""
        log = os.readlink("/proc/self/fd/2") if os.path.exists("/proc/self/fd/2") else "stderr"
        return Whereabouts(os.getpid(), ray.util.get_node_ip_address(), log)

    def close(self) -> None:
        """Free what the actor holds; its group ends the process."""
