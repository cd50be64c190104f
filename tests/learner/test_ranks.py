"""Ranks that meet in real processes, and those that do not."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch

from ppo_ray.learner import ranks
from ppo_ray.learner.ranks import Ranks, Rendezvous

CONTEXT = multiprocessing.get_context("spawn")


def add_up(joined: Ranks) -> tuple[list[float], list[int]]:
    tensor, largest = torch.arange(2.0) + joined.rank, torch.tensor([joined.rank, -joined.rank])
    joined.sum([tensor])
    joined.max([largest])
    return tensor.tolist(), largest.tolist()


def add_up_several(joined: Ranks) -> list[list[float]]:
    """In buckets of 40 bytes: the second and third go together, the fourth is of another type, the last is no view."""
    ranks._BUCKET_BYTES, before = 40, ranks._BUCKET_BYTES
    tensors = [torch.full((2, 3), 1.0 + joined.rank), torch.full((3,), 10.0 * joined.rank), torch.full((4,), 2.0)]
    tensors += [torch.full((1,), 100 * joined.rank), torch.full((5, 2), joined.rank).T]
    joined.sum(tensors)
    ranks._BUCKET_BYTES = before
    return [tensor.unique().tolist() for tensor in tensors]


def run(rank: int, size: int, rendezvous: Rendezvous, answers: Connection, dies: bool) -> None:
    """Join the others, add up, and let rank 1 die before all add up again."""
    try:
        joined = ranks.join(rendezvous, rank, size, "gloo", 60 if dies else 5, 60)
        add_up(joined)
        if dies and rank == 1:
            os._exit(9)
        add_up(joined)
    except Exception as error:
        answers.send(f"{type(error).__name__}: {error}")


def answers(come: list[int], size: int, dies: bool = False) -> list[object]:
    """Let some of the ranks come; returns what each of them got."""
    rendezvous, store = ranks.open_rendezvous("127.0.0.1", 60)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in come]
    processes = [
        CONTEXT.Process(target=run, args=(rank, size, rendezvous, pipe[1], dies))
        for rank, pipe in zip(come, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    found = [pipe[0].recv() for rank, pipe in zip(come, pipes, strict=True) if not (dies and rank == 1)]
    for process in processes:
        process.join(30)
    del store
    return found


def test_ranks_meet_and_add_up(crew: Any) -> None:
    size = len(crew.processes)
    assert crew.run(add_up) == [{2: ([1.0, 3.0], [1, 0]), 3: ([3.0, 6.0], [2, 0])}[size]] * size


def test_many_tensors_are_added_up_in_buckets(crew: Any) -> None:
    size = len(crew.processes)
    sums = {2: [[3.0], [10.0], [4.0], [100], [1]], 3: [[6.0], [30.0], [6.0], [300], [3]]}
    assert crew.run(add_up_several) == [sums[size]] * size


def test_a_rank_that_does_not_come_is_named() -> None:
    (said,) = set(answers([1, 0], 3))
    assert said == "WorkerError: learner-2 did not join the other ranks within 5 s (ray.start_timeout_s)"


def test_the_loss_of_a_rank_is_told_from_other_errors() -> None:
    first, third = answers([0, 1, 2], 3, dies=True)
    assert first.startswith("PeersLost: rank 0 lost touch with another rank")
    assert third.startswith("PeersLost: rank 2 lost touch with another rank")


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
