"""Waiting, failing and closing, with real actors."""

import os
import time

import pytest
import ray

from ppo_ray.actors.group import ActorGroup, Shards, wait_for
from ppo_ray.actors.placement import ActorSpec
from ppo_ray.errors import InputError, WorkerError

pytestmark = pytest.mark.slow
SPEC = ActorSpec("toy", workers=2, threads=1, gpus=0)


@ray.remote
class Toy:
    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, fault: str = "") -> str:
        if fault == "input":
            raise InputError("no such label")
        if fault and self.name == "toy-1":
            raise ValueError(fault)
        return os.environ["PPO_RAY_WORKER"]

    def threads(self) -> tuple[str, str]:
        return os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return self.name

    def die(self) -> None:
        os._exit(7)

    @ray.method(num_returns=2)
    def work(self, table: str, seconds: float) -> tuple[str, dict[str, float]]:
        if seconds < 0:
            raise RuntimeError("negative")
        return table + self.name[-1], {"time/work_s": seconds}

    def close(self) -> None:
        pass


@pytest.fixture
def group(session: None) -> ActorGroup:
    group = ActorGroup(Toy, SPEC, call_timeout_s=60)
    yield group
    group.close()


def test_actors_are_set_up_with_their_threads_and_without_gpus(group: ActorGroup) -> None:
    assert group.setup(60) == ["toy-0", "toy-1"]
    assert group.call("asking", lambda toy: toy.threads.remote()) == [("1", ""), ("1", "")]


def test_a_failing_start_is_reported_with_its_own_error(group: ActorGroup) -> None:
    with pytest.raises(WorkerError, match="toy-1 failed while starting: ValueError: no licence"):
        group.setup(60, "no licence")


def test_an_error_of_ours_keeps_its_kind(group: ActorGroup) -> None:
    with pytest.raises(InputError, match=r"toy-[01], starting: no such label"):
        group.setup(60, "input")


def test_who_is_late_is_named(group: ActorGroup) -> None:
    group.setup(60)
    refs = {
        name: handle.sleep.remote(seconds)
        for name, handle, seconds in zip(group.names, group.handles, (0, 8), strict=True)
    }
    with pytest.raises(WorkerError, match=r"napping: no answer from toy-1 within 1 s"):
        wait_for(refs, 1, "napping")


def test_a_death_is_told_at_once_whoever_else_is_at_work(group: ActorGroup) -> None:
    group.setup(60)
    refs = {"toy-0": group.handles[0].sleep.remote(30), "toy-1": group.handles[1].die.remote()}
    start = time.monotonic()
    with pytest.raises(WorkerError, match="toy-1 was lost while dying"):
        wait_for(refs, 60, "dying")
    assert time.monotonic() - start < 25


def test_shards_chain_and_the_slowest_workers_seconds_count(group: ActorGroup) -> None:
    group.setup(60)
    seconds = [1.0, 2.0, 4.0]
    first = group.deal("making", [lambda toy, s=s: toy.work.remote("a", s) for s in seconds])
    second = group.deal("mending", [lambda toy, t=t: toy.work.remote(t, 0.5) for t in first.tables], source=first)
    assert ray.get(second.tables) == ["a00", "a11", "a00"]
    assert first.wait() == {"time/work_s": 5.0}  # toy-0 made the first and the third
    assert isinstance(second, Shards)
    assert second.wait() == {"time/work_s": 5.0}


def test_the_worker_that_failed_is_blamed_and_not_the_one_behind_it(group: ActorGroup) -> None:
    group.setup(60)
    first = group.deal("making", [lambda toy, s=s: toy.work.remote("a", s) for s in (1.0, -1.0)])
    second = group.deal("mending", [lambda toy, t=t: toy.work.remote(t, 0.5) for t in first.tables[::-1]], source=first)
    with pytest.raises(WorkerError, match=r"toy-1 \(shard 1\) failed while making: RuntimeError: negative"):
        second.wait()
