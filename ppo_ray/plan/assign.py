"""Assignment of a request to the nodes of a cluster by Ray's own rules, and what does not fit.

It is a forecast: Ray decides when the run starts. On an empty cluster it packs and spreads by the same rules, but may
choose other nodes among equal ones.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ppo_ray.plan.cluster import ClusterShape
from ppo_ray.plan.request import Bundle, BundleGroup, ResourceRequest

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Place:
    """The place of one bundle, or of an actor without a placement group."""

    node: int
    """Index into the cluster's nodes."""
    gpus: tuple[int, ...]
    """The node's GPUs that it uses, by index."""


@dataclass(frozen=True)
class Shortage:
    """A resource of which more is needed than there is."""

    what: str
    """What needs it, e.g. `rollout-1 on one node`."""
    resource: str
    """E.g. `GPUs`, `GiB of GPU memory`."""
    demand: float
    supply: float
    remedy: str
    """What to change, by config key."""
    where: str = "the cluster has"

    def __str__(self) -> str:
        return f"{self.what}: {self.demand:.4g} {self.resource} needed, {self.where} {self.supply:.4g}; {self.remedy}"


@dataclass(frozen=True)
class Assignment:
    """The places of all actors of a request."""

    places: dict[str, tuple[Place, ...]]
    """By actor: a place for each of its bundles; an actor for which there is no room is left out."""
    shortages: tuple[Shortage, ...]
    order: tuple[BundleGroup, ...]
    """The order in which Ray is to be asked for the groups."""


def assign(request: ResourceRequest, cluster: ClusterShape) -> Assignment:
    """Put groups, then the actors without one, onto the nodes of an empty cluster.

    Ray gives each group the emptiest nodes. So the learner's groups are asked for first, while one node may still hold
    all of each. Where that leaves no node with enough room for an engine, the engines' groups are asked for first.
    """
    packed_first = tuple(sorted(request.groups, key=lambda group: group.strategy != "PACK"))
    found = _try_order(request, cluster, packed_first)
    if found.shortages and packed_first != request.groups:
        found = _try_order(request, cluster, request.groups)
    return found


def _try_order(request: ResourceRequest, cluster: ClusterShape, order: tuple[BundleGroup, ...]) -> Assignment:
    """Assign the groups in one order, then the actors without a group."""
    nodes = [_FreeNode(node.cpus, (1.0,) * node.gpus) for node in cluster.nodes]
    shortages = list(_total_shortages(request, cluster))
    reported = bool(shortages)
    bundles: dict[str, tuple[Place, ...]] = {}
    for group in order:
        found, left = _place_group(group, nodes)
        if len(found) == len(group.bundles):
            bundles[group.name], nodes = found, left
        elif not reported:
            shortages.append(_group_shortage(group, left))
    places = {
        seat.actor: tuple(bundles[seat.group][index] for index in seat.bundles)
        for seat in request.seats
        if seat.group in bundles
    }
    counts: Counter[tuple[str, int]] = Counter()
    for seat in request.seats:
        if seat.group is not None:
            continue
        bundle = Bundle(seat.cpus, seat.gpus)
        place = _place_actor(bundle, nodes, seat.kind, counts)
        if place is not None:
            places[seat.actor] = (place,)
        elif not reported:
            shortages.append(_group_shortage(BundleGroup(seat.actor, "PACK", (bundle,)), nodes))
    return Assignment(places, tuple(shortages), order)


@dataclass(frozen=True)
class _FreeNode:
    """The free resources of a node."""

    cpus: float
    gpus: tuple[float, ...]
    """Of each GPU."""

    def without(self, bundle: Bundle) -> "tuple[_FreeNode, tuple[int, ...]] | None":
        """Return the node without a bundle, and the GPUs that the bundle takes; None if it does not fit."""
        if bundle.cpus > self.cpus + _TOLERANCE:
            return None
        number, part = (int(bundle.gpus), 1.0) if bundle.gpus >= 1 else (int(bundle.gpus > 0), bundle.gpus)
        fitting = [index for index, free in enumerate(self.gpus) if free >= part - _TOLERANCE]
        taken = tuple(sorted(fitting, key=lambda index: (self.gpus[index], index))[:number])  # the fullest first
        if len(taken) < number:
            return None
        gpus = tuple(max(free - part, 0.0) if index in taken else free for index, free in enumerate(self.gpus))
        return _FreeNode(self.cpus - bundle.cpus, gpus), taken

    def emptiness(self, bundles: Sequence[Bundle]) -> float:
        """Return Ray's own score of a node: the sum, over resources, of the share that the bundles would leave free."""
        cpus, gpus = sum(bundle.cpus for bundle in bundles), sum(bundle.gpus for bundle in bundles)
        pairs = ((cpus, self.cpus), (gpus, sum(self.gpus)))
        return sum((free - asked) / free for asked, free in pairs if asked and free)

    def take(self, bundles: Sequence[Bundle]) -> "tuple[_FreeNode, list[tuple[int, ...]]]":
        """Return the node without as many of the first bundles as fit, and the GPUs of each of these."""
        free, taken = self, []
        for bundle in bundles:
            if (found := free.without(bundle)) is None:
                break
            free, gpus = found
            taken.append(gpus)
        return free, taken


def _place_group(group: BundleGroup, nodes: list[_FreeNode]) -> tuple[tuple[Place, ...], list[_FreeNode]]:
    """Put a group's bundles, which are alike or on one node, onto the emptiest nodes.

    Returns:
        The places of the bundles for which there is room, and the nodes without them.
    """
    nodes, places, waiting = list(nodes), [], list(group.bundles)
    while waiting:
        whole = waiting if group.strategy == "STRICT_PACK" else waiting[:1]
        fits = [index for index, node in enumerate(nodes) if len(node.take(whole)[1]) == len(whole)]
        if not fits:
            break
        index = max(fits, key=lambda index: nodes[index].emptiness(whole))
        nodes[index], taken = nodes[index].take(waiting)
        places += [Place(index, gpus) for gpus in taken]
        waiting = waiting[len(taken) :]
    return tuple(places), nodes


def _place_actor(bundle: Bundle, nodes: list[_FreeNode], kind: str, counts: Counter[tuple[str, int]]) -> Place | None:
    """Put an actor where there are fewest of its kind, and then where most CPUs are free."""
    fits = [(index, found) for index, node in enumerate(nodes) if (found := node.without(bundle))]
    if not fits:
        return None
    index, (free, gpus) = min(fits, key=lambda fit: (counts[kind, fit[0]], -nodes[fit[0]].cpus))
    nodes[index] = free
    counts[kind, index] += 1
    return Place(index, gpus)


def _total_shortages(request: ResourceRequest, cluster: ClusterShape) -> Iterator[Shortage]:
    """Yield the resources of which the whole cluster has less than the request."""
    for resource, demand, supply, option in (
        ("CPUs", request.cpus, cluster.cpus, "threads"),
        ("GPUs", request.gpus, float(cluster.gpus), "gpus"),
    ):
        if demand > supply + _TOLERANCE:
            remedy = f"lower workers or {option} of {_kinds(request)}, or add nodes"
            if resource == "GPUs" and any(group.name.startswith("learner") for group in request.groups):
                remedy += ", or let them share GPUs (ray.placement=colocated)"
            yield Shortage(f"all actors together ({_describe(request, resource)})", resource, demand, supply, remedy)


def _group_shortage(group: BundleGroup, nodes: list[_FreeNode]) -> Shortage:
    """Return the shortage of a group that fits on no node, although the cluster has enough: by the closest node."""
    demand = group.bundles if group.strategy == "STRICT_PACK" else group.bundles[:1]
    cpus, gpus = sum(bundle.cpus for bundle in demand), sum(bundle.gpus for bundle in demand)
    lacks = []
    for node in nodes:
        usable = _usable(node, demand[0].gpus)
        lacks.append((gpus > usable + _TOLERANCE, cpus > node.cpus + _TOLERANCE, usable, node.cpus))
    lacking_gpus, _, free_gpus, free_cpus = min(lacks, key=lambda lack: (lack[0] + lack[1], -lack[2], -lack[3]))
    kind = group.name.partition("-")[0]
    tensor = " or rollout.tensor_parallel" if len(demand) > 1 else ""
    what = f"{group.name} on one node"
    where = "the node that comes closest has left"
    if lacking_gpus:
        remedy = f"lower {kind}.gpus, {kind}.workers{tensor}, or take nodes with more GPUs"
        return Shortage(what, "GPUs", gpus, free_gpus, remedy, where)
    remedy = f"lower {kind}.threads, {kind}.workers{tensor}, or take nodes with more CPUs"
    return Shortage(what, "CPUs", cpus, free_cpus, remedy, where)


def _usable(node: _FreeNode, part: float) -> float:
    """Return how much of a node's GPUs is free for bundles that take `part` of one each."""
    if part >= 1:
        return float(sum(free >= 1 - _TOLERANCE for free in node.gpus))
    return max(node.gpus, default=0.0)


def _kinds(request: ResourceRequest) -> str:
    return ", ".join(dict.fromkeys(seat.kind for seat in request.seats))


def _describe(request: ResourceRequest, resource: str) -> str:
    """Return what each kind of actor asks for, in words."""
    parts = []
    for kind in dict.fromkeys(seat.kind for seat in request.seats):
        seats = [seat for seat in request.seats if seat.kind == kind]
        ranks = len(seats[0].bundles) or 1
        each = (seats[0].cpus if resource == "CPUs" else seats[0].gpus) * ranks
        parts.append(f"{kind}: {len(seats)} x {each:g}")
    return ", ".join(parts)
