"""Where a request fits: literal clusters, and properties of all."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_ray.plan.assign import Assignment, Place, assign
from ppo_ray.plan.cluster import ClusterShape, Node
from ppo_ray.plan.request import ResourceRequest, make_request
from tests.plan.test_request import FOUR_ENGINES, configured


def nodes_of(assignment: Assignment, kind: str) -> list[int]:
    return [place.node for actor, places in assignment.places.items() if actor.startswith(kind) for place in places]


def test_the_learner_has_a_node_and_engines_the_other() -> None:
    request = make_request(configured(*FOUR_ENGINES, "rollout.workers=2", "learner.workers=4", "reward.workers=2"))
    found = assign(request, ClusterShape.uniform(2, cpus=8, gpus=4))
    assert not found.shortages
    assert [group.name for group in found.order] == ["learner", "rollout-0", "rollout-1"]
    assert found.places["learner-3"] == (Place(0, (3,)),)
    assert found.places["rollout-0"] == (Place(1, (0,)), Place(1, (1,)))
    assert found.places["rollout-1"] == (Place(1, (2,)), Place(1, (3,)))
    assert sorted(nodes_of(found, "reward")) == [0, 1]


def test_engines_come_first_where_the_learner_would_leave_no_node_whole_enough() -> None:
    options = ("rollout.gpus=1", "rollout.tensor_parallel=3", "rollout.workers=2", "learner.gpus=1")
    request = make_request(configured(*options, "learner.workers=2"))
    found = assign(request, ClusterShape.uniform(2, cpus=8, gpus=4))
    assert not found.shortages
    assert [group.name for group in found.order] == ["rollout-0", "rollout-1", "learner"]
    assert (nodes_of(found, "rollout"), nodes_of(found, "learner")) == ([0, 0, 0, 1, 1, 1], [0, 1])


def test_colocated_on_one_gpu() -> None:
    options = ("rollout.gpus=1", "learner.gpus=1", "reward.gpus=1", "ray.placement=colocated")
    found = assign(make_request(configured(*options)), ClusterShape.uniform(1, cpus=4, gpus=1))
    assert not found.shortages
    assert set(found.places.values()) == {(Place(0, (0,)),)}


def test_fractions_share_a_gpu_and_two_large_ones_do_not() -> None:
    options = ("rollout.gpus=0.5", "reward.gpus=0.1", "learner.gpus=0.4")
    found = assign(make_request(configured(*options)), ClusterShape.uniform(1, cpus=4, gpus=1))
    assert not found.shortages
    found = assign(make_request(configured("rollout.gpus=0.6", "learner.gpus=0.6")), ClusterShape.uniform(1, 4, gpus=2))
    assert not found.shortages
    assert found.places["rollout-0"] != found.places["learner-0"]


def test_what_cannot_fit_is_told_with_demand_beside_supply() -> None:
    options = ("rollout.workers=4", "rollout.gpus=1", "learner.gpus=1", "learner.threads=6")
    (short,) = assign(make_request(configured(*options)), ClusterShape.uniform(2, cpus=64, gpus=2)).shortages
    assert (short.resource, short.demand, short.supply) == ("GPUs", 5, 4)
    assert str(short) == (
        "all actors together (rollout: 4 x 1, reward: 1 x 0, learner: 1 x 1): 5 GPUs needed, the cluster has 4; "
        "lower workers or gpus of rollout, reward, learner, or add nodes, or let them share GPUs "
        "(ray.placement=colocated)"
    )


def test_enough_in_all_but_not_on_one_node() -> None:
    options = ("rollout.gpus=1", "rollout.tensor_parallel=4")
    (short,) = assign(make_request(configured(*options)), ClusterShape.uniform(2, cpus=8, gpus=3)).shortages
    assert (short.what, short.resource, short.demand, short.supply) == ("rollout-0 on one node", "GPUs", 4, 3)
    assert "rollout.tensor_parallel" in short.remedy
    cluster = ClusterShape((Node("a", cpus=1, gpus=0), Node("b", cpus=0.2, gpus=1)))
    (short,) = assign(make_request(configured("rollout.gpus=1", "learner.threads=1")), cluster).shortages
    assert (short.what, short.resource, short.supply) == ("rollout-0 on one node", "CPUs", 0.2)
    cluster = ClusterShape((Node("a", cpus=0, gpus=1), Node("b", cpus=2, gpus=1)))  # room for one rank, not for two
    options = ("learner.gpus=1", "learner.workers=2", "learner.threads=1")
    (short,) = assign(make_request(configured(*options)), cluster).shortages
    assert (short.what, short.resource, short.demand, short.supply) == ("learner on one node", "CPUs", 0.3333, 0)


clusters = st.lists(
    st.builds(Node, st.just("node"), st.integers(0, 8).map(float), st.integers(0, 4)), min_size=1, max_size=4
).map(lambda nodes: ClusterShape(tuple(nodes)))


@st.composite
def requests(draw: st.DrawFn) -> ResourceRequest:
    ranks = draw(st.integers(1, 3))
    colocated = draw(st.booleans())
    workers = draw(st.integers(1, 3))
    gpus = 1 if ranks > 1 else draw(st.sampled_from([0, 1] if colocated else [0, 0.3, 0.5, 1]))
    learners = draw(st.integers(1, workers * ranks if colocated else 5))
    learner_gpus = gpus if colocated else draw(st.sampled_from([0, 0.5, 1]))
    options = {
        "rollout.workers": workers,
        "rollout.gpus": gpus,
        "rollout.tensor_parallel": ranks,
        "rollout.threads": draw(st.integers(1, 6)),
        "learner.workers": learners,
        "learner.gpus": learner_gpus,
        "learner.threads": draw(st.integers(1, 6)),
        "reward.workers": draw(st.integers(1, 4)),
        "reward.gpus": draw(st.sampled_from([0, 1] if colocated else [0, 0.25, 1])),
        "ray.placement": "colocated" if colocated else "apart",
    }
    return make_request(configured(*(f"{key}={value}" for key, value in options.items())))


@settings(deadline=None)
@given(requests(), clusters)
def test_nothing_is_taken_twice_and_groups_hold_together(request: ResourceRequest, cluster: ClusterShape) -> None:
    found = assign(request, cluster)
    gpus: Counter[tuple[int, int]] = Counter()
    cpus: Counter[int] = Counter()
    for seat in request.seats:
        places = found.places.get(seat.actor, ())
        assert len({place.node for place in places if len(places) > 1}) <= 1  # ranks of an engine on one node
        for place in places:
            cpus[place.node] += seat.cpus
            for gpu in place.gpus if seat.gpus else ():
                gpus[place.node, gpu] += seat.gpus
    assert all(used <= 1 + 1e-6 for used in gpus.values())
    assert all(used <= cluster.nodes[node].cpus + 1e-6 for node, used in cpus.items())
    placed = set(found.places) == {seat.actor for seat in request.seats}
    assert placed or found.shortages  # whatever has no room is told
    assert all(short.demand > short.supply for short in found.shortages)


@settings(deadline=None)
@given(requests(), clusters)
def test_too_little_in_all_is_always_told(request: ResourceRequest, cluster: ClusterShape) -> None:
    short = {shortage.resource for shortage in assign(request, cluster).shortages}
    if request.gpus > cluster.gpus + 1e-6:
        assert "GPUs" in short
    if request.cpus > cluster.cpus + 1e-6:
        assert "CPUs" in short


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 8))
def test_learners_are_packed_and_rewards_spread(learners: int, gpus: list[int], rewards: int) -> None:
    options = (f"learner.workers={learners}", "learner.gpus=1", f"reward.workers={rewards}")
    cluster = ClusterShape(tuple(Node("node", cpus=100, gpus=number) for number in gpus))
    found = assign(make_request(configured(*options)), cluster)
    if learners > sum(gpus):
        assert [(short.demand, short.supply) for short in found.shortages] == [(learners, sum(gpus))]
        return
    largest = sorted(gpus, reverse=True)
    fewest = next(number for number in range(1, len(gpus) + 1) if sum(largest[:number]) >= learners)
    assert len(set(nodes_of(found, "learner"))) == fewest
    counts = Counter(nodes_of(found, "reward"))
    assert len(counts) == min(rewards, len(gpus))
    assert max(counts.values()) <= math.ceil(rewards / len(gpus))
