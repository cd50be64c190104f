"""The plan of a run: where each actor goes, the memory it takes, and what does not fit."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ppo_ray.config import Config
from ppo_ray.machine import multiplies_bfloat16
from ppo_ray.plan.assign import Assignment, Shortage, assign
from ppo_ray.plan.cluster import GIB, ClusterShape
from ppo_ray.plan.engine import kv_bytes, kv_cache_term, rollout_terms, waiting_problem
from ppo_ray.plan.learner import learner_terms
from ppo_ray.plan.memory import (
    Device,
    Term,
    checkpoint_bytes,
    disk_terms,
    node_terms,
    reward_terms,
    store_terms,
)
from ppo_ray.plan.request import ResourceRequest, Seat, make_request
from ppo_ray.plan.sizes import ModelSizes

_REMEDIES = {
    "learner": "learner.microbatch_tokens, learner.sharding=fsdp2 on more learner.workers, gradient_checkpointing, "
    "learner.offload",
    "rollout": "rollout.kv_cache_mib, rollout.dtype=bfloat16, more rollout.tensor_parallel",
    "reward": "reward.batch_size",
}


@dataclass(frozen=True)
class Need:
    """Memory that is needed in one place, and what is there."""

    name: str
    """E.g. `node-0`, `node-0 GPU 1`, `node-0: object store`."""
    needed: int
    """Bytes."""
    available: int | None
    """Bytes; None: not known."""
    actors: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A run on a cluster, before it is started."""

    cluster: ClusterShape
    request: ResourceRequest
    """What Ray will be asked for."""
    assignment: Assignment
    terms: dict[str, tuple[Term, ...]]
    """By actor; of each of its ranks."""
    gpus: tuple[Need, ...]
    """Every GPU that is used."""
    nodes: tuple[Need, ...]
    """Every node's memory, its object store included."""
    stores: tuple[Need, ...]
    """Every node's object store."""
    store_terms: tuple[Term, ...]
    disk_terms: tuple[Term, ...]
    stop: str
    """How fast the disk must be for a run that is stopped."""
    shortages: tuple[Shortage, ...]
    """What does not fit."""
    warnings: tuple[str, ...] = ()
    """What fits, and is slow."""

    @property
    def fits(self) -> bool:
        """Whether everything has room."""
        return not self.shortages


def make_plan(config: Config, cluster: ClusterShape, sizes: ModelSizes) -> Plan:
    """Plan a run on a cluster.

    Args:
        config: of the run.
        cluster: empty.
        sizes: of the config's models.
    """
    request = make_request(config)
    assignment = assign(request, cluster)
    gpu_memory = min((node.gpu_memory for node in cluster.nodes if node.gpu_memory), default=None)
    terms = {seat.actor: tuple(_terms(config, sizes, seat, gpu_memory)) for seat in request.seats}
    stored = tuple(store_terms(config, sizes))
    takes_turns = config.ray.placement == "colocated"
    gpus = tuple(_gpu_needs(cluster, assignment, request, terms, takes_turns))
    stores = tuple(_store_needs(cluster, assignment, stored))
    nodes = tuple(_node_needs(cluster, assignment, terms, stores))
    memory = [
        *_memory_shortages(gpus, "GiB of GPU memory"),
        *_memory_shortages(nodes, "GiB of memory"),
        *_memory_shortages(stores, "GiB of object store"),
    ]
    shortages = (*assignment.shortages, *memory)
    disk = tuple(disk_terms(config, sizes))
    warnings = tuple(_warnings(config, sizes, gpu_memory))
    stop = describe_stop(config, sizes)
    return Plan(cluster, request, assignment, terms, gpus, nodes, stores, stored, disk, stop, shortages, warnings)


def describe_stop(config: Config, sizes: ModelSizes) -> str:
    """Say how fast the disk must be to take a checkpoint before a run that a signal stops is ended."""
    size, limit = checkpoint_bytes(sizes), config.ray.stop_timeout_s
    return (
        f"a checkpoint: {size / GIB:.2f} GiB; a run that is stopped has ray.stop_timeout_s={limit:g} s to write it, so "
        f"that the disk must take {_megabytes(2 * size / limit)} MB/s if half of them go to the update in progress"
    )


def find_stop_problem(config: Config, sizes: ModelSizes, speed: float) -> str | None:
    """Say why a run that a signal stops may lose steps: its checkpoint takes more than half of the time there is.

    Args:
        config: of the run.
        sizes: of its models.
        speed: of the disk, bytes per second.
    """
    size, limit = checkpoint_bytes(sizes), config.ray.stop_timeout_s
    seconds = size / speed
    if seconds <= limit / 2:
        return None
    return (
        f"a checkpoint has {size / GIB:.2f} GiB, and the disk of output_dir takes {_megabytes(speed)} MB/s from one "
        f"process: to write it takes about {seconds:.0f} s. ray.stop_timeout_s={limit:g} s must be enough for that and "
        "for the update in progress when a signal stops the run; else the steps since the newest checkpoint are lost. "
        f"Set it to {2 * seconds:.0f} or more, and as long between SIGTERM and SIGKILL (docs/clusters.md); "
        "or take a faster disk, or a smaller checkpoint.every_steps, so that less is lost"
    )


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f}" if num_bytes >= 10e6 else f"{num_bytes / 1e6:.2g}"


def find_emulated_dtypes(config: Config) -> Iterator[str]:
    """Yield a sentence per option that makes CPUs compute in bfloat16 where this machine's can only emulate it."""
    asked = {
        "model.dtype": not config.learner.gpus and config.model.dtype == "bfloat16",
        "rollout.dtype": not config.rollout.gpus and config.rollout.dtype == "bfloat16",
    }
    for name in [name for name, emulated in asked.items() if emulated and not multiplies_bfloat16()]:
        yield (
            f"{name}=bfloat16, but this machine's processor has no products of bfloat16 (AVX512-BF16 or AMX) and "
            f"emulates them, more slowly than float32; leave {name} out on such CPUs"
        )


def _warnings(config: Config, sizes: ModelSizes, gpu_memory: int | None) -> Iterator[str]:
    yield from find_emulated_dtypes(config)
    if config.rollout.engine == "vllm":
        kv_cache = kv_cache_term(config, sizes, gpu_memory).num_bytes
        if waits := waiting_problem(config, kv_cache // kv_bytes(config, sizes), kv_cache >> 20):
            yield waits


def _terms(config: Config, sizes: ModelSizes, seat: Seat, gpu_memory: int | None) -> Iterable[Term]:
    if seat.kind == "learner":
        return learner_terms(config, sizes, int(seat.actor.rpartition("-")[2]))
    return rollout_terms(config, sizes, gpu_memory) if seat.kind == "rollout" else reward_terms(config, sizes)


def _gpu_needs(
    cluster: ClusterShape,
    assignment: Assignment,
    request: ResourceRequest,
    terms: dict[str, tuple[Term, ...]],
    takes_turns: bool,
) -> Iterator[Need]:
    """Yield the need of each GPU: what its actors keep, and what they use at work.

    Of actors that take turns only the largest use at work counts.
    """
    users: dict[tuple[int, int], list[str]] = {}
    for seat in request.seats:
        for place in assignment.places.get(seat.actor, ()):
            for gpu in place.gpus if seat.gpus else ():
                users.setdefault((place.node, gpu), []).append(seat.actor)
    for (node, gpu), actors in sorted(users.items()):
        kept = sum(total(terms[actor], "gpu") - at_work(terms[actor]) for actor in actors)
        working = [at_work(terms[actor]) for actor in actors]
        needed = kept + (max(working) if takes_turns else sum(working))
        name = f"{cluster.nodes[node].name} GPU {gpu}"
        yield Need(name, needed, cluster.nodes[node].gpu_memory, tuple(actors))


def _store_needs(cluster: ClusterShape, assignment: Assignment, stored: tuple[Term, ...]) -> Iterator[Need]:
    for index, node in enumerate(cluster.nodes):
        actors = _actors_on(index, assignment)
        uses = any(not actor.startswith("reward-") for actor in actors)
        yield Need(f"{node.name}: object store", total(stored, "host") if uses else 0, node.store, actors)


def _node_needs(
    cluster: ClusterShape,
    assignment: Assignment,
    terms: dict[str, tuple[Term, ...]],
    stores: tuple[Need, ...],
) -> Iterator[Need]:
    """Yield the need of each node; a process mostly keeps host memory that it has freed, so nobody takes turns."""
    for index, (node, store) in enumerate(zip(cluster.nodes, stores, strict=True)):
        ranks = [actor for actor, places in assignment.places.items() for place in places if place.node == index]
        needed = sum(total(terms[actor], "host") for actor in ranks) + store.needed
        needed += total(node_terms(), "host")
        yield Need(node.name, needed, node.memory, _actors_on(index, assignment))


def _actors_on(node: int, assignment: Assignment) -> tuple[str, ...]:
    return tuple(actor for actor, places in assignment.places.items() if any(place.node == node for place in places))


def _memory_shortages(needs: Iterable[Need], resource: str) -> Iterator[Shortage]:
    for need in needs:
        if need.available is not None and need.needed > need.available:
            kinds = dict.fromkeys(actor.rpartition("-")[0] for actor in need.actors)
            if resource == "GiB of object store":
                remedy = "raise ray.object_store_mib, or the nodes' --object-store-memory"
            else:
                remedy = f"lower {'; '.join(_REMEDIES[kind] for kind in kinds)}; or take larger ones"
            figures = need.needed / GIB, need.available / GIB
            yield Shortage(f"{need.name} ({', '.join(need.actors)})", resource, *figures, remedy, "it has")


def total(terms: Iterable[Term], device: Device) -> int:
    """Return the bytes of all terms on a device."""
    return sum(term.num_bytes for term in terms if term.device == device)


def at_work(terms: Iterable[Term]) -> int:
    """Return the bytes on a GPU that an actor gives back when its turn is over."""
    return sum(term.num_bytes for term in terms if term.device == "gpu" and term.when == "at work")
