"""Who lends what to whom, and until when."""

from dataclasses import replace

import pytest

from ppo_ray.errors import WorkerLost
from ppo_ray.weights.transports import IPCTransport
from tests.weights.transports.cluster import CONFIG, Cluster


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(2)


def test_a_bucket_is_lent_when_all_have_read_the_one_before(cluster: Cluster) -> None:
    weights = replace(cluster.weights(5), ranks=(cluster.learner, cluster.started("learner-1")))
    assert IPCTransport(CONFIG).send(weights, cluster) == ["rollout-0 has it", "rollout-1 has it"]
    handles = ("handle of learner-0", "handle of learner-1")
    assert cluster.calls == [
        *(
            (name, method, arguments)
            for bucket in (0, 1)
            for method, arguments, names in (
                ("export_weights", (5, bucket), ("learner-0", "learner-1")),
                ("map_weights", ("the manifest", bucket, *handles), ("rollout-0", "rollout-1")),
            )
            for name in names
        ),
        ("learner-0", "release_weights", ()),
        ("learner-1", "release_weights", ()),
    ]
    ranks, engines = ("learner-0", "learner-1"), ("rollout-0", "rollout-1")
    assert [(who, limit) for _, who, limit in cluster.waits] == [(ranks, 7), (engines, 7)] * 2 + [(ranks, 7)]


LENDING = [("learner-0", "export_weights"), ("rollout-1", "map_weights")] * 2 + [("learner-0", "release_weights")]


def test_an_engine_that_comes_later_maps_for_itself(cluster: Cluster) -> None:
    transport = IPCTransport(CONFIG)
    assert transport.send_to(cluster.weights(5), cluster, cluster.members[1]) == "rollout-1 has it"
    assert cluster.done() == LENDING


def test_an_engine_that_is_lost_does_not_stop_the_others(cluster: Cluster) -> None:
    """They read the second bucket without it; its successor gets all of it, and then all together once more."""
    transport = IPCTransport(CONFIG)
    cluster.catch_up = lambda member: transport.send_to(cluster.weights(5), cluster, member)
    cluster.faults["rollout-0", "map_weights"] = WorkerLost("rollout-0: its process died", "rollout-0")
    assert transport.send(cluster.weights(5), cluster) == ["rollout-0 has it", "rollout-1 has it"]
    assert cluster.revived == ["rollout-0"]
    done = cluster.done()
    assert done[:6] == [
        ("learner-0", "export_weights"),
        ("rollout-0", "map_weights"),
        ("rollout-1", "map_weights"),
        *LENDING[2:],
    ]
    assert done[6:11] == [(name.replace("rollout-1", "rollout-0"), method) for name, method in LENDING]
    assert [name for name, method in done[11:] if method == "map_weights"] == ["rollout-0", "rollout-1"] * 2


def test_the_only_engine_may_be_lost(cluster: Cluster) -> None:
    cluster.faults["rollout-1", "map_weights"] = WorkerLost("rollout-1: its process died", "rollout-1")
    with pytest.raises(WorkerLost, match="rollout-1: its process died"):
        IPCTransport(CONFIG).send_to(cluster.weights(5), cluster, cluster.members[1])
    assert cluster.done()[-1] == ("learner-0", "release_weights")


def test_a_learner_that_is_lost_is_named(cluster: Cluster) -> None:
    cluster.faults["learner-0", "export_weights"] = WorkerLost("learner-0: its process died", "learner-0")
    with pytest.raises(WorkerLost, match="its process died"):
        IPCTransport(CONFIG).send(cluster.weights(5), cluster)
