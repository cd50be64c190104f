"""The nodes of a cluster with the resources that a plan counts."""

from dataclasses import dataclass

from ppo_ray.machine import count_cpus, measure_memory

GIB = 1 << 30
STORE_SHARE = 0.3
"""Share of a node's memory that Ray gives to its object store by default."""


@dataclass(frozen=True)
class Node:
    """One machine of a cluster. None: not known, and not checked."""

    name: str
    cpus: float
    gpus: int = 0
    memory: int | None = None
    """Bytes, the object store's share included."""
    gpu_memory: int | None = None
    """Bytes of each GPU."""
    object_store: int | None = None
    """Bytes of Ray's object store."""

    @property
    def store(self) -> int | None:
        """Bytes of Ray's object store: Ray's default if they are not known."""
        if self.object_store is None and self.memory is not None:
            return int(self.memory * STORE_SHARE)
        return self.object_store


@dataclass(frozen=True)
class ClusterShape:
    """The machines of a cluster, empty."""

    nodes: tuple[Node, ...]

    @classmethod
    def uniform(
        cls, nodes: int, cpus: float, gpus: int = 0, memory: int | None = None, gpu_memory: int | None = None
    ) -> "ClusterShape":
        """Describe a cluster of like machines; memory in bytes."""
        return cls(tuple(Node(f"node-{index}", cpus, gpus, memory, gpu_memory) for index in range(nodes)))

    @classmethod
    def this_machine(cls, object_store: int | None = None) -> "ClusterShape":
        """Describe the machine that this runs on, as a private Ray would use it.

        Args:
            object_store: bytes that Ray's object store will be given.
        """
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpu_memory = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)), default=None)
        node = Node("this machine", float(count_cpus()), gpus, measure_memory(), gpu_memory, object_store)
        return cls((node,))

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)
