"""Who is called, in which order, with which rank; who is named and replaced when one is lost."""

from dataclasses import replace
from typing import Any

import pytest

from ppo_ray.actors.watch import Member
from ppo_ray.errors import WorkerError, WorkerLost
from ppo_ray.weights.transports import NCCLTransport
from tests.weights.transports.cluster import CONFIG, Cluster


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(2)


def init(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "nccl_unique_id_b64": "id",
        "rank_offset": rank,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": 2 << 20,
        "packed_num_buffers": 1,
    }


MEETING = [
    ("learner-0", "join_transfers"),
    ("rollout-0", "connect"),
    ("rollout-1", "connect"),
    ("learner-0", "join_transfers"),
]
SENDING = [("rollout-0", "receive_weights"), ("rollout-1", "receive_weights"), ("learner-0", "send_weights")]


def test_every_engine_has_a_rank_of_its_own(cluster: Cluster) -> None:
    acks = NCCLTransport(CONFIG).send(cluster.weights(5), cluster)
    assert acks == ["rollout-0 has it", "rollout-1 has it"]
    assert cluster.calls == [
        ("learner-0", "join_transfers", (None,)),
        ("rollout-0", "connect", (init(1, 3),)),
        ("rollout-1", "connect", (init(2, 3),)),
        ("learner-0", "join_transfers", ("id", 3)),
        ("rollout-0", "receive_weights", ("the manifest",)),
        ("rollout-1", "receive_weights", ("the manifest",)),
        ("learner-0", "send_weights", (5,)),
    ]
    assert {limit for *_, limit in cluster.waits} == {7}
    assert cluster.waits[-1][1] == ("rollout-0", "rollout-1", "learner-0")


def test_engines_of_two_gpus_have_two_ranks_and_all_learner_ranks_gather(cluster: Cluster) -> None:
    second = cluster.started("learner-1")
    weights = replace(cluster.weights(5), ranks=(cluster.learner, second))
    rollout = CONFIG.rollout.model_copy(update={"tensor_parallel": 2})
    transport = NCCLTransport(CONFIG.model_copy(update={"rollout": rollout}))
    assert transport.send(weights, cluster) == ["rollout-0 has it", "rollout-1 has it"]
    assert cluster.calls[1:4] == [
        ("rollout-0", "connect", (init(1, 5),)),
        ("rollout-1", "connect", (init(3, 5),)),
        ("learner-0", "join_transfers", ("id", 5)),
    ]
    assert cluster.calls[-2:] == [("learner-0", "send_weights", (5,)), ("learner-1", "send_weights", (5,))]


def test_they_meet_once_and_again_when_one_is_another(cluster: Cluster) -> None:
    transport = NCCLTransport(CONFIG)
    transport.send(cluster.weights(1), cluster)
    assert cluster.done() == MEETING + SENDING
    transport.send(cluster.weights(2), cluster)
    assert cluster.done() == SENDING
    cluster.members[1] = cluster.started("rollout-1")
    assert transport.send_to(cluster.weights(2), cluster, cluster.members[1]) == "rollout-1 has it"
    assert cluster.calls[1:3] == [
        ("rollout-1", "connect", (init(1, 2),)),
        ("learner-0", "join_transfers", ("id", 2)),
    ]
    assert cluster.done()[3:] == [("rollout-1", "receive_weights"), ("learner-0", "send_weights")]
    transport.send(cluster.weights(3), cluster)
    assert cluster.done() == MEETING + SENDING
    cluster.learner = cluster.started("learner-0")
    transport.send(cluster.weights(3), cluster)
    assert cluster.done() == MEETING + SENDING


@pytest.mark.parametrize("step", ["connect", "receive_weights"])
def test_an_engine_that_is_lost_takes_the_others_with_it_but_not_the_learner(cluster: Cluster, step: str) -> None:
    transport, caught_up = NCCLTransport(CONFIG), []
    cluster.catch_up = lambda member: caught_up.append(transport.send_to(cluster.weights(1), cluster, member))
    cluster.faults["rollout-1", step] = WorkerLost("rollout-1: its process died", "rollout-1")
    assert transport.send(cluster.weights(1), cluster) == ["rollout-0 has it", "rollout-1 has it"]
    assert sorted(cluster.revived) == ["rollout-0", "rollout-1"]
    assert sorted(caught_up) == ["rollout-0 has it", "rollout-1 has it"]
    assert ("learner-0", "abort_transfer", ("id",)) in cluster.calls  # the group that it may not have begun to join
    done = cluster.done()
    freed = done.index(("learner-0", "abort_transfer"))
    assert done[freed + 1] == ("learner-0", "release_weights")  # it answers: it is out of the broadcast
    assert done[-7:] == MEETING + SENDING
    assert ("leaving a weight sync by NCCL that broke off", ("learner-0",), 3) in cluster.waits


def test_a_learner_that_does_not_come_out_is_lost_and_its_successor_finds_new_engines(cluster: Cluster) -> None:
    transport = NCCLTransport(CONFIG)
    cluster.faults["rollout-0", "receive_weights"] = WorkerLost("rollout-0: its process died", "rollout-0")
    cluster.faults["learner-0", "release_weights"] = WorkerLost("learner-0: no answer within 3 s", "learner-0")
    with pytest.raises(WorkerLost, match="learner-0: no answer") as caught:
        transport.send(cluster.weights(1), cluster)
    assert caught.value.name == "learner-0" and cluster.revived == []
    cluster.learner = cluster.started("learner-0")
    transport.send(cluster.weights(0), cluster)
    assert sorted(cluster.revived) == ["rollout-0", "rollout-1"]
    assert cluster.done()[-7:] == MEETING + SENDING


def test_a_lost_learner_is_not_waited_for(cluster: Cluster) -> None:
    transport = NCCLTransport(CONFIG)
    cluster.faults["learner-0", "send_weights"] = WorkerLost("learner-0: its process died", "learner-0")
    with pytest.raises(WorkerLost, match="its process died"):
        transport.send(cluster.weights(1), cluster)
    assert ("learner-0", "abort_transfer") not in cluster.done()


def test_a_damaged_tensor_ends_the_run_and_the_learner_can_still_save(cluster: Cluster) -> None:
    cluster.faults["rollout-1", "receive_weights"] = WorkerError("rollout-1: weights arrived damaged")
    with pytest.raises(WorkerError, match="arrived damaged") as caught:
        NCCLTransport(CONFIG).send(cluster.weights(1), cluster)
    assert not isinstance(caught.value, WorkerLost)
    assert cluster.done()[-2:] == [("learner-0", "abort_transfer"), ("learner-0", "release_weights")]


def test_an_engine_that_dies_again_and_again_ends_it(cluster: Cluster) -> None:
    transport = NCCLTransport(CONFIG)
    lost = WorkerLost("rollout-1: its process died", "rollout-1")

    def revive(error: WorkerLost, may_stop: bool) -> Member:
        raise WorkerError(f"{error.name} was lost 4 times in a row")

    cluster.revive = revive  # type: ignore[method-assign]
    cluster.faults["rollout-1", "receive_weights"] = lost
    with pytest.raises(WorkerError, match="4 times in a row"):
        transport.send(cluster.weights(1), cluster)
