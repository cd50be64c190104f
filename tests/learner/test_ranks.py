"""Ranks that meet in real processes, and those that do not."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from ppo_ray.errors import PeersLost, WorkerError, WorkerLost
from ppo_ray.learner import ranks
from ppo_ray.learner.group import _find_lost
from ppo_ray.learner.ranks import Ranks, Rendezvous

CONTEXT = multiprocessing.get_context("spawn")


def add_up(joined: Ranks) -> tuple[list[float], list[int]]:
    tensor, largest = torch.arange(2.0) + joined.rank, torch.tensor([joined.rank, -joined.rank])
    joined.sum([tensor])
    joined.max([largest])
    return tensor.tolist(), largest.tolist()


def add_up_several(joined: Ranks) -> list[list[float]]:
    """In buckets of 40 bytes: the second and third go together, the fourth is of another type, the last is no view."""
    before = ranks._BUCKET_BYTES, ranks._IN_FLIGHT
    ranks._BUCKET_BYTES, ranks._IN_FLIGHT = 40, 2
    tensors = [torch.full((2, 3), 1.0 + joined.rank), torch.full((3,), 10.0 * joined.rank), torch.full((4,), 2.0)]
    tensors += [torch.full((1,), 100 * joined.rank), torch.full((5, 2), joined.rank).T]
    joined.sum(tensors)
    ranks._BUCKET_BYTES, ranks._IN_FLIGHT = before
    return [tensor.unique().tolist() for tensor in tensors]


def add_up_in_bfloat16(joined: Ranks) -> list[list[float]]:
    """1 + 1/256 is 1 there, and 256 + 1 is 256; a type of its own, a single tensor and a bucket of two."""
    tensors = [torch.tensor([1 + 1 / 256, 256.0 * (joined.rank == 0) + (joined.rank == 1)])]
    joined.sum(tensors, torch.bfloat16)
    tensors += [torch.full((2, 2), 1 + 1 / 256), torch.full((1,), 1 + 1 / 256)]
    joined.sum(tensors[1:], torch.bfloat16)
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    return [tensor.flatten().tolist() for tensor in tensors]


def join(rank: int, rendezvous: Rendezvous, said: Connection, together: Any) -> None:
    """Come as one of three, when all that come are ready: a process may take long to start."""
    together.wait(300)
    try:
        ranks.join(rendezvous, rank, 3, "gloo", 5, 60)
    except Exception as error:
        said.send(f"{type(error).__name__}: {error}")


def test_ranks_meet_and_add_up(crew: Any) -> None:
    assert crew.run(add_up) == [([3.0, 6.0], [2, 0])] * 3


def test_many_tensors_are_added_up_in_buckets(crew: Any) -> None:
    assert crew.run(add_up_several) == [[[6.0], [30.0], [6.0], [300], [3]]] * 3


def test_sums_may_be_made_in_less_precision(crew: Any) -> None:
    assert crew.run(add_up_in_bfloat16) == [[[3.0, 256.0], [3.0] * 4, [3.0]]] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    rendezvous, store = ranks.open_rendezvous("127.0.0.1", 60)
    stray = dist.TCPStore("127.0.0.1", rendezvous.port, wait_for_workers=False)
    stray.set("here/2", "")  # of another meeting: it is not the one that is missing
    heard, said = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(2)), strict=True)
    together = CONTEXT.Barrier(2)
    processes = [CONTEXT.Process(target=join, args=(rank, rendezvous, said[rank], together)) for rank in (1, 0)]
    for process in processes:
        process.start()
    error = "WorkerError: learner-2 did not join the other ranks within 5 s (ray.start_timeout_s)"
    assert [pipe.recv() for pipe in heard] == [error] * 2
    for process in processes:
        process.join(30)
    del store


def test_no_two_meetings_have_the_same_keys() -> None:
    meetings = [ranks.open_rendezvous("127.0.0.1", 5) for _ in range(2)]
    first, second = (rendezvous.prefix for rendezvous, _ in meetings)
    assert first != second and len(first) == len(second) == 32


def test_the_meeting_is_open_on_its_own_address_alone() -> None:
    rendezvous, store = ranks.open_rendezvous("127.0.0.1", 5)
    listening = [item for item in psutil.Process().net_connections("inet") if item.laddr.port == rendezvous.port]
    assert {item.laddr.ip for item in listening if item.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    del store
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", rendezvous.port), timeout=5):
        pass


def test_one_rank_needs_nobody() -> None:
    tensor = torch.ones(2)
    ranks.Ranks().sum([tensor])
    ranks.Ranks().max([tensor])
    assert tensor.tolist() == [1, 1]
    ranks.leave()


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_ranks_may_meet_at_an_address_of_version_6() -> None:
    rendezvous, store = ranks.open_rendezvous("::1", 30)
    try:
        assert ranks.join(rendezvous, 0, 1, "gloo", 30, 30).size == 1
    finally:
        ranks.leave()
        del store


def test_a_meeting_on_loopback_leaves_nccl_to_look_for_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's process meets engines on other nodes too, by an address that its NCCL advertises."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    rendezvous, store = ranks.open_rendezvous("127.0.0.1", 30)
    try:
        ranks.join(rendezvous, 0, 1, "gloo", 30, 30)
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ.get("NCCL_SOCKET_IFNAME")) == ("lo", None)
    finally:
        ranks.leave()
        del store


def test_an_address_that_no_interface_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(
        WorkerError, match=r"own address on the way to 127\.0\.0\.1.* is 127\.0\.0\.1, which is on none"
    ):
        ranks.join(Rendezvous("127.0.0.1", 1, "x"), 0, 2, "gloo", 1, 1)


def test_the_rank_that_is_gone_is_found_though_others_wait_for_peers_that_gave_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in two groups of two, of which the last rank dies: the first one's partner is there, and works no longer."""
    members = {ref: SimpleNamespace(name=f"learner-{rank}") for rank, ref in enumerate(("waits", "told", "dead"))}

    def wait(calls: Any) -> None:
        if "waits" in calls:
            assert len(calls) > 1, "it would be waited for until its own limit"
            raise PeersLost("learner-1 lost touch")
        raise WorkerLost("it died", "learner-2") if "dead" in calls else PeersLost("learner-1 lost touch")

    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs[1:], refs[:1]))
    with pytest.raises(WorkerLost, match="it died"):
        _find_lost(members, wait)  # type: ignore[arg-type]
