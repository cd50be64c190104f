"""The resources that Ray is asked for: placement groups, and each actor's seat in one of them or on any node.

Apart, every rollout worker has a placement group of its own, one bundle per rank, all on one node; the learner's ranks
share one that is packed, or one for each copy that they shard; reward workers are spread and need none. Colocated,
learner ranks and reward workers sit in the bundles of the rollout workers and take equal shares of their GPUs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ppo_ray.config import Config
from ppo_ray.plan.demand import KINDS, PRECISION, ActorSpec, Kind, actor_name, actor_specs

Strategy = Literal["STRICT_PACK", "PACK"]
Slot = tuple[str, int]
"""A bundle by its group's name and its index there."""


@dataclass(frozen=True)
class Bundle:
    """Resources that are reserved together, on one node."""

    cpus: float
    gpus: float

    def resources(self) -> dict[str, float]:
        """Return the bundle in the form that Ray's placement groups take."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


@dataclass(frozen=True)
class BundleGroup:
    """The bundles of one placement group, which Ray reserves all together or not at all."""

    name: str
    strategy: Strategy
    """STRICT_PACK: all bundles on one node; PACK: on as few nodes as possible."""
    bundles: tuple[Bundle, ...]


@dataclass(frozen=True)
class Seat:
    """The bundles or the node that one actor runs in, and what it takes there."""

    actor: str
    """Its name, e.g. `rollout-0`."""
    cpus: float
    gpus: float
    """Of each bundle that it has, or of a node."""
    group: str | None = None
    """None: in no group, on the node that has fewest actors of its kind."""
    bundles: tuple[int, ...] = ()
    """Of the group: one, or one a rank."""

    @property
    def kind(self) -> str:
        """The config section of the actor: `rollout`, `reward` or `learner`."""
        return self.actor.rpartition("-")[0]


@dataclass(frozen=True)
class ResourceRequest:
    """All resources that Ray is asked for."""

    groups: tuple[BundleGroup, ...]
    """Those that need most of one node first."""
    seats: tuple[Seat, ...]

    @property
    def cpus(self) -> float:
        """CPUs that are reserved in all."""
        return sum(bundle.cpus for bundle in self._parts)

    @property
    def gpus(self) -> float:
        """GPUs that are reserved in all."""
        return sum(bundle.gpus for bundle in self._parts)

    def seat(self, actor: str) -> Seat:
        """Return an actor's seat."""
        return next(seat for seat in self.seats if seat.actor == actor)

    @property
    def _parts(self) -> list[Bundle]:
        spread = [Bundle(seat.cpus, seat.gpus) for seat in self.seats if seat.group is None]
        return [bundle for group in self.groups for bundle in group.bundles] + spread


def make_request(config: Config, kinds: Sequence[Kind] = KINDS) -> ResourceRequest:
    """Return what the actors of a config ask Ray for.

    Args:
        config: of the run.
        kinds: of actors that are started; an evaluation has no learner.
    """
    specs = actor_specs(config, kinds)
    if config.ray.placement == "colocated":
        return _request_colocated(specs)
    return _request_apart(specs, config.learner.shard_size or config.learner.workers)


def _request_apart(specs: dict[str, ActorSpec], shard_size: int) -> ResourceRequest:
    groups: list[BundleGroup] = []
    seats: list[Seat] = []
    for spec in specs.values():
        part = Bundle(spec.rank_cpus, spec.gpus / spec.ranks)
        if spec.key == "reward":
            seats += [Seat(name, part.cpus, part.gpus) for name in _names(spec)]
        elif spec.key == "learner":
            for first in range(0, spec.workers, shard_size):
                group = "learner" if shard_size == spec.workers else f"learner-shards-{first // shard_size}"
                groups.append(BundleGroup(group, "PACK", (part,) * shard_size))
                names = enumerate(_names(spec)[first : first + shard_size])
                seats += [Seat(name, part.cpus, part.gpus, group, (index,)) for index, name in names]
        else:
            ranks = tuple(range(spec.ranks))
            groups += [BundleGroup(name, "STRICT_PACK", (part,) * spec.ranks) for name in _names(spec)]
            seats += [Seat(name, part.cpus, part.gpus, name, ranks) for name in _names(spec)]
    return ResourceRequest(tuple(groups), tuple(seats))


def _request_colocated(specs: dict[str, ActorSpec]) -> ResourceRequest:
    """Put learner ranks, and reward workers that use a GPU, into the bundles of the rollout workers."""
    rollout, reward = specs["rollout"], specs.get("reward")
    slots = [(name, rank) for name in _names(rollout) for rank in range(rollout.ranks)]
    engines = [(name, rollout, [slot for slot in slots if slot[0] == name]) for name in _names(rollout)]
    seated = [*engines, *_guests(specs, slots)]

    def users(slot: Slot) -> list[ActorSpec]:
        return [spec for _, spec, own in seated if slot in own]

    def bundle(slot: Slot) -> Bundle:
        return Bundle(round(sum(spec.rank_cpus for spec in users(slot)), 4), float(bool(rollout.gpus)))

    def share(own: list[Slot]) -> float:
        """Return an equal part of the fullest bundle's GPU, rounded down as Ray counts."""
        number = max(sum(bool(spec.gpus) for spec in users(slot)) for slot in own)
        return int(PRECISION / number) / PRECISION

    groups = [BundleGroup(name, "STRICT_PACK", tuple(bundle(slot) for slot in own)) for name, _, own in engines]
    seats = [
        Seat(name, spec.rank_cpus, share(own) if spec.gpus else 0.0, own[0][0], tuple(rank for _, rank in own))
        for name, spec, own in seated
    ]
    if reward and not reward.gpus:
        seats += [Seat(name, reward.rank_cpus, 0.0) for name in _names(reward)]
    return ResourceRequest(tuple(groups), tuple(seats))


def _guests(specs: dict[str, ActorSpec], slots: list[Slot]) -> Iterator[tuple[str, ActorSpec, list[Slot]]]:
    """Yield the actors that share the engines' bundles, with their slots.

    Learner ranks take one slot after another, reward workers one engine after another.
    """
    if learner := specs.get("learner"):
        for name, slot in zip(_names(learner), slots, strict=False):
            yield name, learner, [slot]
    if (reward := specs.get("reward")) and reward.gpus:
        across = sorted(slots, key=lambda slot: slot[1])
        for index, name in enumerate(_names(reward)):
            yield name, reward, [across[index % len(across)]]


def _names(spec: ActorSpec) -> list[str]:
    return [actor_name(spec.key, index) for index in range(spec.workers)]
