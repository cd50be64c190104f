"""Who lends what to whom, and until when."""

from dataclasses import replace

import pytest

from ppo_ray.errors import WorkerLost
from ppo_ray.weights.transports import IPCTransport, merge_handles
from tests.weights.transports.cluster import CONFIG, Cluster


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(2)


def test_memory_is_lent_until_all_have_read_it(cluster: Cluster) -> None:
    weights = replace(cluster.weights(5), ranks=(cluster.learner, cluster.started("learner-1")))
    assert IPCTransport(CONFIG).send(weights, cluster) == ["rollout-0 has it", "rollout-1 has it"]
    handles = ("the manifest", "handles of learner-0", "handles of learner-1")
    assert cluster.calls == [
        ("learner-0", "export_weights", (5,)),
        ("learner-1", "export_weights", (5,)),
        ("rollout-0", "receive_weights", handles),
        ("rollout-1", "receive_weights", handles),
        ("learner-0", "release_weights", ()),
        ("learner-1", "release_weights", ()),
    ]
    waits = [(who, limit) for _, who, limit in cluster.waits if "learner-0" in who]
    assert waits == [(("learner-0", "learner-1"), 7)] * 2


def test_an_engine_that_comes_later_maps_for_itself(cluster: Cluster) -> None:
    transport = IPCTransport(CONFIG)
    assert transport.send_to(cluster.weights(5), cluster, cluster.members[1]) == "rollout-1 has it"
    assert cluster.done() == [
        ("learner-0", "export_weights"),
        ("rollout-1", "receive_weights"),
        ("learner-0", "release_weights"),
    ]


def test_a_learner_that_is_lost_is_named(cluster: Cluster) -> None:
    cluster.faults["learner-0", "export_weights"] = WorkerLost("learner-0: its process died", "learner-0")
    with pytest.raises(WorkerLost, match="its process died"):
        IPCTransport(CONFIG).send(cluster.weights(5), cluster)


def test_every_engine_finds_its_own_gpu() -> None:
    ranks = [[{"GPU-a": "w on a"}, {"GPU-a": "v on a"}], [{"GPU-b": "w on b"}, {"GPU-b": "v on b"}]]
    assert merge_handles(ranks) == [{"GPU-a": "w on a", "GPU-b": "w on b"}, {"GPU-a": "v on a", "GPU-b": "v on b"}]
