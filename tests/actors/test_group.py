"""Waiting, failing, replacing and closing, with real actors."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from ppo_ray.actors.group import ActorGroup
from ppo_ray.actors.shards import Shards
from ppo_ray.actors.watch import DependencyLost, Member
from ppo_ray.actors.worker import CONTROL, Worker
from ppo_ray.config import RayConfig
from ppo_ray.errors import InputError, WorkerError, WorkerLost
from ppo_ray.events import Event
from ppo_ray.plan import ActorSpec

pytestmark = pytest.mark.slow
SPEC = ActorSpec("toy", workers=2, threads=1, gpus=0, modules=("no_such_module", "colorsys"))


class OddError(Exception):
    def __init__(self, message: str, more: object) -> None:
        super().__init__(message)
        self.more = more


@ray.remote(concurrency_groups=CONTROL)
class Toy(Worker):
    def setup(self, fault: str = "") -> str:
        self.loaded = ""
        if fault == "input":
            raise InputError("no such label")
        if fault == "die" and self._name == "toy-1":
            os._exit(7)
        if fault and self._name == "toy-1":
            raise ValueError(fault)
        return os.environ["PPO_RAY_WORKER"]

    def threads(self) -> tuple[str, str, int]:
        return os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"], os.nice(0)

    def has_imported(self, module: str) -> bool:
        return module in sys.modules

    def load(self, what: str) -> None:
        self.loaded = what

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return self._name

    def die(self) -> None:
        os._exit(7)

    def fail_oddly(self, how: str) -> None:
        if how == "in pickling":
            raise OddError("the answer is 42", lambda: 0)
        raise OddError("the answer is 42", None)

    def die_once(self, marker: str) -> str:
        if self._name == "toy-1" and not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(7)
        return self._name

    def give_up_once(self, marker: str) -> str:
        if self._name == "toy-1" and not os.path.exists(marker):
            open(marker, "w").close()
            raise WorkerLost("cannot go on")
        return self._name

    def lose_gpu_once(self, marker: str) -> str:
        import torch

        if self._name == "toy-1" and not os.path.exists(marker):
            open(marker, "w").close()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nand a page of advice")
        return self._name

    @ray.method(num_returns=2)
    def work(self, table: str, seconds: float) -> tuple[str, dict[str, float]]:
        if seconds < 0:
            raise RuntimeError("negative")
        time.sleep(seconds / 20)
        return f"{table}{self.loaded}{self._name[-1]}", {"time/work_s": seconds}


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def make_group(session: None, events: list[Event]) -> Iterator[Callable[..., ActorGroup]]:
    groups = []

    def make(**limits: float) -> ActorGroup:
        groups.append(ActorGroup(Toy, SPEC, RayConfig(**limits), events.append))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


@pytest.fixture
def group(make_group: Callable[..., ActorGroup]) -> ActorGroup:
    return make_group(call_timeout_s=60.0)


def pids(group: ActorGroup) -> list[int]:
    return [ray.get(member.handle.whereabouts.remote(), timeout=60).pid for member in group.members]


def works(group: ActorGroup, seconds: list[float], source: Shards | None = None) -> Shards:
    calls = [lambda toy, table, s=s: toy.work.remote(table or "a", s) for s in seconds]
    return Shards(group, "making" if source is None else "mending", calls, 60, source)


def test_actors_are_set_up_with_modules_and_threads_at_the_drivers_priority_and_without_gpus(group: ActorGroup) -> None:
    assert group.setup() == ["toy-0", "toy-1"]
    assert group.call("asking", lambda toy: toy.threads.remote()) == [("1", "", os.nice(0))] * 2
    assert group.call("asking", lambda toy: toy.has_imported.remote("colorsys")) == [True, True]
    assert group.call_first("asking", lambda toy: toy.sleep.remote(0)) == "toy-0"


def test_a_failing_start_is_reported_with_its_own_error(group: ActorGroup) -> None:
    with pytest.raises(WorkerError, match=r"toy-1 \(pid .*\) failed while starting: ValueError: no licence") as caught:
        group.setup("no licence")
    assert not isinstance(caught.value, WorkerLost)


def test_an_error_of_ours_keeps_its_kind(group: ActorGroup) -> None:
    with pytest.raises(InputError, match=r"toy-[01], starting: no such label"):
        group.setup("input")


def test_who_is_late_is_named_with_its_place(make_group: Callable[..., ActorGroup]) -> None:
    group = make_group(call_timeout_s=1.0)
    group.setup()
    calls = {member.handle.sleep.remote(60 * index): member for index, member in enumerate(group.members)}
    where = r"toy-1 \(pid \d+ on node [\d.]+, log .*worker.*\.err\)"
    with pytest.raises(WorkerLost, match=rf"napping: no answer within 1 s from {where}") as caught:
        group.watch(calls, "napping")
    assert caught.value.name == "toy-1"
    ray.kill(group.members[1].handle)  # it would keep the group from closing


def test_a_control_call_is_answered_at_work(group: ActorGroup) -> None:
    group.setup()
    ref = group.members[0].handle.sleep.remote(60)
    assert pids(group)[0] > 0
    assert not ray.wait([ref], timeout=0)[0]
    ray.kill(group.members[0].handle)


def test_a_death_is_told_at_once_whoever_else_is_at_work(group: ActorGroup) -> None:
    group.setup()
    first, second = group.members
    working = first.handle.sleep.remote(1000)
    with pytest.raises(WorkerLost, match=r"toy-1 \(pid .*\) was lost while dying: its process died"):
        group.watch({working: first, second.handle.die.remote(): second}, "dying")
    assert not ray.wait([working], timeout=0)[0]
    ray.kill(first.handle)


def test_a_lost_worker_is_replaced_and_its_call_made_again(group: ActorGroup, events: list[Event], tmp_path) -> None:
    group.setup()
    before = pids(group)
    marker = str(tmp_path / "died")
    assert group.call("dying once", lambda toy: toy.die_once.remote(marker)) == ["toy-0", "toy-1"]
    after = pids(group)
    assert before[0] == after[0] and before[1] != after[1]
    assert [(event.kind, event.worker) for event in events] == [("worker_replaced", "toy-1")]
    assert "was lost while dying once" in events[0].message
    marker = str(tmp_path / "gave up")
    assert group.call("giving up once", lambda toy: toy.give_up_once.remote(marker)) == ["toy-0", "toy-1"]
    assert pids(group)[0] == before[0] and pids(group)[1] != after[1]
    assert "toy-1, giving up once: cannot go on" in events[1].message
    marker = str(tmp_path / "no gpu")
    assert group.call("using a GPU", lambda toy: toy.lose_gpu_once.remote(marker)) == ["toy-0", "toy-1"]
    assert events[2].message.endswith(
        "lost its GPU while using a GPU: CUDA error: an illegal memory access was encountered"
    )


def test_a_worker_that_is_stopped_is_found_and_replaced(
    make_group: Callable[..., ActorGroup], events: list[Event]
) -> None:
    group = make_group(ping_timeout_s=3.0)
    group.setup()
    stopped = pids(group)[1]
    os.kill(stopped, signal.SIGSTOP)
    assert group.call("napping", lambda toy: toy.sleep.remote(0.1)) == ["toy-0", "toy-1"]
    assert "did not answer a control call for 3 s" in events[0].message
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{stopped}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{stopped}")


def test_who_dies_again_and_again_is_not_replaced_for_ever(make_group: Callable[..., ActorGroup]) -> None:
    group = make_group(max_restarts=1)
    group.setup()
    with pytest.raises(WorkerError, match=r"toy-[01] was lost 2 times in a row \(ray.max_restarts=1\)") as caught:
        group.call("dying", lambda toy: toy.die.remote())
    assert not isinstance(caught.value, WorkerLost)
    group.catch_up = lambda member: group.watch({member.handle.load.remote("W"): member}, "catching up")
    with pytest.raises(WorkerError, match=r"toy-[01] was lost 2 times in a row"):  # though it catches up each time
        group.call("dying", lambda toy: toy.die.remote())
    group = make_group(max_restarts=1)
    group.setup()

    def catches_up_and_dies(member: Member) -> None:
        group.watch({member.handle.load.remote("W"): member}, "catching up")
        group.gather({member.handle.die.remote(): member}, "catching up on more", 60)

    group.catch_up = catches_up_and_dies
    with pytest.raises(WorkerError, match=r"toy-[01] was lost 2 times in a row"):
        group.call("dying", lambda toy: toy.die.remote())
    starting = make_group(max_restarts=1)
    with pytest.raises(WorkerError, match="toy-1 was lost 2 times in a row"):
        starting.setup("die")


def test_a_replacement_is_brought_to_where_the_group_is(group: ActorGroup) -> None:
    group.setup()
    group.catch_up = lambda member: ray.get(member.handle.load.remote("W"), timeout=60)
    shards = works(group, [0.0, 20.0, 0.0, 0.0])  # the second and the fourth are toy-1's
    ray.get(group.members[0].handle.sleep.remote(0), timeout=60)
    os.kill(pids(group)[1], signal.SIGKILL)
    assert shards.wait() == {"time/work_s": 20.0}
    assert ray.get(shards.tables, timeout=60) == ["a0", "aW1", "a0", "aW1"]


def test_what_follows_a_lost_shard_is_made_again_too(group: ActorGroup) -> None:
    group.setup()
    first = works(group, [0.0, 20.0])
    second = works(group, [0.5, 0.5], source=first)
    third = works(group, [0.5, 0.5], source=second)
    os.kill(pids(group)[1], signal.SIGKILL)
    assert third.wait() == {"time/work_s": 20.0}
    assert ray.get(third.tables, timeout=60) == ["a000", "a111"]


def test_shards_chain_and_the_slowest_workers_seconds_count(group: ActorGroup) -> None:
    group.setup()
    first = works(group, [1.0, 2.0, 4.0])
    second = works(group, [0.5] * 3, source=first)
    assert ray.get(second.tables, timeout=60) == ["a00", "a11", "a00"]
    assert first.wait() == {"time/work_s": 5.0}  # toy-0 made the first and the third
    assert second.wait() == {"time/work_s": 5.0}
    own = {name: report.metrics for name, report in first.actors.items()}
    assert own == {"toy-0": {"time/work_s": 5.0}, "toy-1": {"time/work_s": 2.0}}
    assert {report.host for report in first.actors.values()} == {socket.gethostname()}


def test_the_worker_that_failed_is_blamed_and_not_the_one_behind_it(group: ActorGroup) -> None:
    group.setup()
    first = works(group, [1.0, -1.0])
    second = works(group, [0.5, 0.5], source=first)
    with pytest.raises(WorkerError, match=r"toy-1 \(pid .*\) failed while making: RuntimeError: negative"):
        second.wait()


def test_tables_that_are_lost_before_they_are_read_are_made_again(group: ActorGroup) -> None:
    group.setup()
    shards = works(group, [0.0, 0.0])
    tries = []

    def consume(tables: list[object]) -> list[str]:
        tries.append(list(tables))
        if len(tries) < 3:
            raise DependencyLost("gone with its node")
        return ray.get(tables, timeout=60)

    assert shards.use(consume) == ["a0", "a1"]
    assert len({ref for tables in tries for ref in tables}) == 6


@pytest.mark.parametrize("how", ["in pickling", "in unpickling"])
def test_an_error_that_cannot_be_sent_is_the_works_own(group: ActorGroup, events: list[Event], how: str) -> None:
    """Another worker would meet it too: nobody is replaced, nothing is made again."""
    group.setup()
    before = pids(group)
    with pytest.raises(WorkerError, match="the answer is 42") as caught:
        group.call("failing", lambda toy: toy.fail_oddly.remote(how))
    assert not isinstance(caught.value, WorkerLost | DependencyLost)
    assert pids(group) == before and events == []
