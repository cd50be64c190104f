"""Ranks that meet in real processes, and those that do not."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection

import psutil
import pytest
import torch

from ppo_ray.learner import ranks
from ppo_ray.learner.ranks import Rendezvous

CONTEXT = multiprocessing.get_context("spawn")


def run(rank: int, size: int, rendezvous: Rendezvous, answers: Connection, dies: bool) -> None:
    try:
        joined = ranks.join(rendezvous, rank, size, "gloo", 60 if dies else 5, 60)
        tensor = torch.arange(2.0) + rank
        joined.sum([tensor])
        if dies and rank == 1:
            os._exit(9)
        largest = torch.tensor([rank, -rank])
        joined.max([largest])
        ranks._BUCKET_BYTES = 40  # the first two go together, the third does not fit, the fourth is of another type
        several = [torch.full((2, 3), 1.0 + rank), torch.full((3,), 10.0 * rank), torch.full((4,), 2.0)]
        several += [torch.full((5, 2), rank).T, torch.full((1,), 100 * rank)]
        joined.sum(several)
        answers.send((tensor.tolist(), largest.tolist(), [one.unique().tolist() for one in several]))
        ranks.leave()
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


def test_ranks_meet_and_add_up() -> None:
    assert answers([0, 1, 2], 3) == [([3.0, 6.0], [2, 0], [[6.0], [30.0], [6.0], [3], [300]])] * 3


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
