"""The base of all actors: a control call that tells where an actor runs, even while it works."""

import contextlib
import os
import resource
import socket
import sys
from dataclasses import dataclass

import psutil
import ray

from ppo_ray.machine import import_ahead
from ppo_ray.plan.cluster import GIB
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
    host: str | None = None
    """Name of the machine, as it knows itself."""

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
        return Whereabouts(os.getpid(), ray.util.get_node_ip_address(), log, socket.gethostname())

    def measure_memory(self) -> dict[str, float]:
        """Return the memory of this process in GiB, by the metrics' names; some tens of microseconds.

        `memory/KIND_gib` is resident now, objects of Ray's store that are mapped included, `memory/KIND_peak_gib` the
        most that ever was. Where torch uses GPUs, `memory/KIND_gpu_gib` and `memory/KIND_gpu_reserved_gib` are the most
        that its tensors took, and that it held for them, since the last call: the sum over the GPUs.
        """
        kind = self._name.rpartition("-")[0]
        resident = psutil.Process().memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # which the kernel counts a little late
        found = {
            f"memory/{kind}_gib": resident / GIB,
            f"memory/{kind}_peak_gib": max(resident, peak) / GIB,
        }
        torch = sys.modules.get("torch")  # an actor without it has no GPU's memory
        if torch is not None and torch.cuda.is_initialized():
            gpus = range(torch.cuda.device_count())
            found[f"memory/{kind}_gpu_gib"] = sum(map(torch.cuda.max_memory_allocated, gpus)) / GIB
            found[f"memory/{kind}_gpu_reserved_gib"] = sum(map(torch.cuda.max_memory_reserved, gpus)) / GIB
            for gpu in gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
        return found

    def close(self) -> None:
        """Free what the actor holds; its group ends the process."""
