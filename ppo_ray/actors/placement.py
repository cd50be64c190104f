"""Ray's placement groups for the actors of a run: reserved, waited for, given back."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ppo_ray import stopping
from ppo_ray.config import Config
from ppo_ray.errors import InputError
from ppo_ray.plan import ClusterShape, Node, ResourceRequest, make_request
from ppo_ray.plan.assign import Assignment, assign
from ppo_ray.plan.demand import KINDS, Kind
from ppo_ray.plan.request import BundleGroup, Seat

_POLL_S = 1.0  # signal handlers run between polls
_AT_ONCE_S = 0.01


@dataclass(frozen=True)
class Seats:
    """The placement of actors by name; Ray places freely an actor that is not named here."""

    seats: Mapping[str, Seat] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    """Ray's placement groups by name."""

    def options(self, actor: str) -> dict[str, Any]:
        """Return the part of an actor's `.options(...)` that places it, and its successors."""
        if actor not in self.seats:
            return {}
        seat = self.seats[actor]
        if seat.group is None:
            return {"scheduling_strategy": "SPREAD"}
        ranks = len(seat.bundles) > 1
        return {
            "num_cpus": seat.cpus,
            "num_gpus": 0 if ranks else seat.gpus,  # in several bundles its ranks take the GPUs
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.groups[seat.group], seat.bundles[0], placement_group_capture_child_tasks=ranks
            ),
        }


@contextlib.contextmanager
def reserve(config: Config, kinds: Sequence[Kind] = KINDS) -> Iterator[Seats]:
    """Reserve the resources of all actors of these kinds for the length of a block.

    Raises:
        InputError: the cluster can never hold them, or has no room within `ray.start_timeout_s`; says what is needed
            beside what is there.
        Interrupted: the run is to be stopped.
    """
    request = make_request(config, kinds)
    order = check_fit(request).order
    with contextlib.ExitStack() as stack:
        groups: dict[str, Any] = {}
        for group in order:
            bundles = [bundle.resources() for bundle in group.bundles]
            groups[group.name] = placement_group(bundles, strategy=group.strategy)
            stack.callback(_remove, groups[group.name])
        _wait(order, groups, config.ray.start_timeout_s)
        yield Seats({seat.actor: seat for seat in request.seats}, groups)


def check_fit(request: ResourceRequest) -> Assignment:
    """Check that the connected cluster, were it empty, could hold all actors at once; it may yet grow by itself.

    Returns:
        Where they would go.

    Raises:
        InputError: it cannot; names demand, supply and config keys.
    """
    found = assign(request, read_cluster())
    if found.shortages and state.get_max_resources_from_cluster_config() is None:  # no autoscaler
        lines = "\n".join(f"  {shortage}" for shortage in found.shortages)
        raise InputError(f"the cluster cannot hold the actors, nothing was started\n{lines}\n{_describe_supply()}")
    return found


def read_cluster(gpu_memory: int | None = None) -> ClusterShape:
    """Describe the nodes of the connected cluster that are alive.

    Args:
        gpu_memory: bytes of each GPU, which Ray does not know.
    """
    nodes = []
    for node in sorted(_live_nodes(), key=lambda node: str(node["NodeManagerAddress"])):
        resources = node["Resources"]
        store = int(resources.get("object_store_memory", 0))
        memory = int(resources.get("memory", 0)) + store  # Ray keeps the store apart
        nodes.append(
            Node(
                f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})",
                resources.get("CPU", 0.0),
                int(resources.get("GPU", 0)),
                memory,
                gpu_memory,
                store,
            )
        )
    return ClusterShape(tuple(nodes))


def _wait(order: Sequence[BundleGroup], groups: Mapping[str, Any], limit_s: float) -> None:
    """Wait until all groups have room."""
    deadline = time.monotonic() + limit_s
    for first in order:
        while not groups[first.name].wait(max(min(_POLL_S, deadline - time.monotonic()), _AT_ONCE_S)):
            stopping.check()
            if time.monotonic() < deadline:
                continue
            waiting = [group for group in order if not groups[group.name].wait(_AT_ONCE_S)]
            wanted = "; ".join(f"{group.name} wants {_describe(group)}" for group in waiting)
            raise InputError(
                f"no room for the actors within {limit_s:g} s (ray.start_timeout_s): {wanted}. Lower workers, threads "
                f"or gpus of these sections, wait until others are done, or add nodes\n{_describe_supply()}"
            )


def _describe(group: BundleGroup) -> str:
    bundle, number = group.bundles[0], len(group.bundles)
    where = "" if number == 1 else " on one node" if group.strategy == "STRICT_PACK" else " on few nodes"
    return f"{number} x ({bundle.cpus:g} CPUs, {bundle.gpus:g} GPUs){where}"


def _describe_supply() -> str:
    """Say what each node has and what is free, one line per node."""
    free = available_resources_per_node()
    lines = []
    for node in _live_nodes():
        left = free.get(node["NodeID"], {})
        figures = ", ".join(
            f"{node['Resources'].get(key, 0):g} {key}s, {left.get(key, 0):g} free" for key in ("CPU", "GPU")
        )
        lines.append(f"  node {node['NodeManagerAddress']} ({node['NodeID'][:6]}): {figures}")
    return "\n".join(["the cluster has", *lines])


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _remove(group: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        remove_placement_group(group)
