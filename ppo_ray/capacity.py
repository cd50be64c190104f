"""`ppo-ray plan`: describes the cluster, plans the run on it, prints the plan; starts nothing."""

from dataclasses import dataclass

from rich.console import Console

from ppo_ray.config import Config
from ppo_ray.errors import InputError
from ppo_ray.plan import ClusterShape, ModelSizes, plan
from ppo_ray.plan.cluster import GIB
from ppo_ray.report import print_plan


@dataclass(frozen=True)
class Described:
    """The cluster as the command line describes it; None: not given."""

    nodes: int | None = None
    cpus: float | None = None
    """Of each node, like all that follows."""
    gpus: int | None = None
    memory_gib: float | None = None
    gpu_memory_gib: float | None = None
    address: str | None = None
    """Of a cluster that runs."""


def show(config: Config, described: Described, console: Console) -> bool:
    """Print where every actor of a config would go, the memory that takes, and what does not fit.

    Returns:
        Whether everything fits.

    Raises:
        InputError: the description is not one, no cluster answers at the address, or a model's config cannot be read.
    """
    cluster = _cluster(config, described)
    found = plan(config, cluster, ModelSizes.read(config))
    print_plan(console, found)
    return found.fits


def _cluster(config: Config, described: Described) -> ClusterShape:
    gpu_memory = _bytes(described.gpu_memory_gib)
    sizes = (described.nodes, described.cpus, described.gpus, described.memory_gib)
    if described.address is not None:
        if any(size is not None for size in sizes):
            raise InputError("--address asks the cluster itself: leave out --nodes, --cpus, --gpus and --memory")
        from ppo_ray.actors.placement import connected_cluster
        from ppo_ray.actors.session import ray_session

        with ray_session(config.ray.model_copy(update={"address": described.address})):
            return connected_cluster(gpu_memory)
    if all(size is None for size in (*sizes, gpu_memory)):
        return ClusterShape.this_machine(config.ray.object_store_mib << 20)
    if described.cpus is None:
        raise InputError("--cpus is missing: a cluster is described by the CPUs of each node at least")
    memory = _bytes(described.memory_gib)
    return ClusterShape.uniform(described.nodes or 1, described.cpus, described.gpus or 0, memory, gpu_memory)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
