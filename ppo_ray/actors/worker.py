"""What all our actors have in common: they say where they are, at once, whatever they are doing."""

import os
from dataclasses import dataclass

import ray

CONTROL = {"control": 1}
"""`concurrency_groups` of every actor class: a thread of its own for control calls, beside the one that works."""


@dataclass(frozen=True)
class Whereabouts:
    """Where an actor runs."""

    pid: int
    node: str
    """IP address."""
    log: str
    """File on that node that the actor writes its output and errors to."""
    node_id: str = ""
    """Ray's own name of the node."""
    gpus: tuple[int, ...] = ()
    """GPUs of the node that Ray has given it."""

    def __str__(self) -> str:
        return f"pid {self.pid} on node {self.node}, log {self.log}"


class Worker:
    """The part of an actor that is the same in all; subclasses are decorated with `ray.remote`."""

    def __init__(self, name: str) -> None:
        """Take the worker's name, e.g. `"rollout-0"`; the heavy work is `setup`'s."""
        self._name = name

    @ray.method(concurrency_group="control")
    def whereabouts(self) -> Whereabouts:
        """Answer, as long as the process is alive and not stopped."""
        log = os.readlink("/proc/self/fd/2") if os.path.exists("/proc/self/fd/2") else "stderr"
        node_id, gpus = ray.get_runtime_context().get_node_id(), tuple(map(int, ray.get_gpu_ids()))
        return Whereabouts(os.getpid(), ray.util.get_node_ip_address(), log, node_id, gpus)

    def close(self) -> None:
        """Free what the actor holds; its group ends the process."""
