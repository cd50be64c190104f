"""The output of `ppo-ray plan`: whether a run fits, where every actor goes, the memory it takes, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_ray.config import Config
from ppo_ray.errors import InputError
from ppo_ray.events import say
from ppo_ray.machine import import_ahead
from ppo_ray.plan import ClusterShape, ModelSizes, Plan, make_plan
from ppo_ray.plan.cluster import GIB
from ppo_ray.plan.demand import KINDS
from ppo_ray.plan.memory import Term, node_terms


def print_plan(console: Console, plan: Plan, verbose: bool = False) -> None:
    """Print a plan, the verdict first; `verbose` adds what each actor's memory is made of."""
    if plan.fits:
        say(console, "It fits. Nothing was started.")
    else:
        say(console, "It does not fit:")
        for shortage in plan.shortages:
            say(console, f"  {shortage}")
    for line in (*plan.warnings, *_name_idle_gpus(plan)):
        say(console, line)
    _print_needs(console, plan)
    _print_actors(console, plan)
    disk = sum(term.num_bytes for term in plan.disk_terms)
    say(console, f"disk for checkpoints: {_gib(disk)} GiB")
    say(console, plan.stop)
    if verbose:
        _print_terms(console, plan)
    else:
        say(console, "--verbose shows what the memory is made of")


def _name_idle_gpus(plan: Plan) -> Iterator[str]:
    """Yield which GPUs no actor uses, and the options that would use them."""
    used = {need.name for need in plan.gpus}
    unused = 0
    for node in plan.cluster.nodes:
        free = [gpu for gpu in range(node.gpus) if f"{node.name} GPU {gpu}" not in used]
        unused += len(free)
        if free:
            yield f"unused on {node.name}: {'GPUs' if len(free) > 1 else 'GPU'} {', '.join(map(str, free))}"
    if not unused:
        return
    without = dict.fromkeys(seat.kind for seat in plan.request.seats if not seat.gpus)
    options = [f"{kind}.gpus=1" for kind in ("rollout", "reward", "learner") if kind in without]
    if len(without) < len(KINDS):
        options += ["more rollout.workers", "more learner.workers", "more rollout.tensor_parallel"]
    yield f"{unused} of {plan.cluster.gpus} GPUs stay unused; options that would use them: {', '.join(options)}"


def _print_actors(console: Console, plan: Plan) -> None:
    table = _make_table("actor", "node", "GPUs", "CPUs reserved", "GPUs reserved", "placement group")
    strategies = {group.name: f"{group.name} ({group.strategy})" for group in plan.request.groups}
    for seat in plan.request.seats:
        places = plan.assignment.places.get(seat.actor, ())
        node = ", ".join(dict.fromkeys(plan.cluster.nodes[place.node].name for place in places)) or "no room"
        gpus = ", ".join(str(gpu) for place in places for gpu in place.gpus) if seat.gpus else ""
        ranks = max(len(seat.bundles), 1)
        amounts = [f"{ranks} x {amount:g}" if ranks > 1 else f"{amount:g}" for amount in (seat.cpus, seat.gpus)]
        table.add_row(seat.actor, Text(node), gpus or "-", *amounts, strategies.get(seat.group or "", "none, spread"))
    console.print(table)


def _print_terms(console: Console, plan: Plan) -> None:
    """Print each kind of actor's arithmetic once: like actors hold alike, but the first learner rank a little more."""
    table = _make_table("memory of", "what", "GiB", "where", "arithmetic")
    table.columns[2].justify = "right"
    for actor, terms in plan.terms.items():
        if actor.endswith("-0"):
            kind = actor.removesuffix("-0")
            ranks = max(len(plan.request.seat(actor).bundles), 1)
            _add_terms(table, f"each rank of a {kind}" if ranks > 1 else f"each {kind}", terms)
    _add_terms(table, "every node", tuple(node_terms()))
    _add_terms(table, "object store of a node", plan.store_terms)
    _add_terms(table, "disk", plan.disk_terms, where="disk")
    console.print(table)


def _add_terms(table: Table, who: str, terms: Sequence[Term], where: str = "") -> None:
    for index, term in enumerate(terms):
        place = where or {"gpu": "GPU", "host": "node"}[term.device]
        last = index == len(terms) - 1
        cells = (who if index == 0 else "", term.what, _gib(term.num_bytes), place, Text(term.how))
        table.add_row(*cells, end_section=last)


def _print_needs(console: Console, plan: Plan) -> None:
    table = _make_table("where", "GiB needed", "GiB there", "by")
    for column in table.columns[1:3]:
        column.justify = "right"
    for needs in (plan.gpus, plan.nodes, plan.stores):
        for index, need in enumerate(needs):
            there = "not known" if need.available is None else _gib(need.available)
            style = "red" if need.available is not None and need.needed > need.available else ""
            row = (Text(need.name), _gib(need.needed), there, ", ".join(need.actors))
            table.add_row(*row, style=style, end_section=index == len(needs) - 1)
    console.print(table)


def _make_table(*headings: str) -> Table:
    """Make a table that breaks long words and cuts nothing."""
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}" if num_bytes < 100 * GIB else f"{num_bytes / GIB:.0f}"


@dataclass(frozen=True)
class Described:
    """The cluster as the command line describes it; None: not given."""

    nodes: int | None = None
    cpus: float | None = None
    """CPUs of each node; the fields below are of each node too."""
    gpus: int | None = None
    memory_gib: float | None = None
    gpu_memory_gib: float | None = None
    address: str | None = None
    """Address of a running cluster."""


def show(config: Config, described: Described, console: Console, verbose: bool = False) -> bool:
    """Print whether a config fits, where every actor of it would go, and the memory that takes.

    Returns:
        Whether everything fits.

    Raises:
        InputError: the description is not one, no cluster answers at the address, or a model's config cannot be read.
    """
    import_ahead("torch", "transformers.models.auto.modeling_auto")
    cluster = _cluster(config, described)
    found = make_plan(config, cluster, ModelSizes.read(config))
    print_plan(console, found, verbose)
    return found.fits


def _cluster(config: Config, described: Described) -> ClusterShape:
    gpu_memory = _bytes(described.gpu_memory_gib)
    sizes = (described.nodes, described.cpus, described.gpus, described.memory_gib)
    if described.address is not None:
        if any(size is not None for size in sizes):
            raise InputError("--address asks the cluster itself: leave out --nodes, --cpus, --gpus and --memory")
        from ppo_ray.actors.placement import read_cluster
        from ppo_ray.actors.session import ray_session

        with ray_session(config.ray.model_copy(update={"address": described.address})):
            return read_cluster(gpu_memory)
    if all(size is None for size in (*sizes, gpu_memory)):
        return ClusterShape.this_machine(config.ray.object_store_mib << 20)
    if described.cpus is None:
        raise InputError("--cpus is missing: a cluster is described by the CPUs of each node at least")
    memory = _bytes(described.memory_gib)
    return ClusterShape.uniform(described.nodes or 1, described.cpus, described.gpus or 0, memory, gpu_memory)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
