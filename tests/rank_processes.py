"""Real processes with gloo between them, as learner ranks are; started once, asked often."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from ppo_ray.learner import ranks
from ppo_ray.learner.ranks import Rendezvous

_CONTEXT = multiprocessing.get_context("spawn")
_LIMIT_S = 300.0


class RankProcesses:
    """Some ranks that have met."""

    def __init__(self, size: int) -> None:
        rendezvous, self._store = ranks.open_rendezvous("127.0.0.1", _LIMIT_S)
        pipes = [_CONTEXT.Pipe() for _ in range(size)]
        self.processes = [
            _CONTEXT.Process(target=_serve, args=(rank, size, rendezvous, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        self._pipes = [here for here, _ in pipes]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(ranks, *arguments)` in every process at once; an exception is returned as its text."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # whoever is gone is told below
                pipe.send((function, arguments))
        return [self._answer(pipe) for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(30)
            process.kill()

    def _answer(self, pipe: Connection) -> Any:
        assert pipe.poll(_LIMIT_S), "a rank does not answer"
        try:
            return pipe.recv()
        except EOFError:
            return "gone"


@contextlib.contextmanager
def rank_processes(size: int) -> Iterator[RankProcesses]:
    """Start ranks, and end them whatever happens."""
    processes = RankProcesses(size)
    try:
        yield processes
    finally:
        processes.close()


def _serve(rank: int, size: int, rendezvous: Rendezvous, pipe: Connection) -> None:
    torch.set_num_threads(1)
    joined = ranks.join(rendezvous, rank, size, "gloo", _LIMIT_S, 60)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send(function(joined, *arguments))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    ranks.leave()
