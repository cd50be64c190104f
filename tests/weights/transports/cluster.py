"""Workers that are fakes: they write down what they are asked, and fail as they are told."""

from collections.abc import Callable
from typing import Any

from ppo_ray.actors.watch import Member
from ppo_ray.config import load_config
from ppo_ray.errors import WorkerLost
from ppo_ray.weights.acks import PublishedWeights

CONFIG = load_config(
    None,
    [
        *("model.path=m", "prompts.path=p", "reward.function=a:b", "output_dir=o"),
        *("rollout.weight_bucket_mib=2", "ray.transfer_timeout_s=7", "ray.ping_timeout_s=3"),
    ],
)


NUM_BUCKETS = 2
"""Of the weights that are lent by CUDA IPC."""


class Handle:
    """An actor: writes down its calls; `faults` says which of them end how."""

    def __init__(self, name: str, cluster: "Cluster") -> None:
        self.name, self.cluster = name, cluster

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> object:
                return self.cluster.called(self, method, arguments)

        return Method


class Cluster:
    """An `ActorGroup` of engines, and a learner beside it."""

    def __init__(self, num_engines: int) -> None:
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.waits: list[tuple[str, tuple[str, ...], float]] = []
        self.faults: dict[tuple[str, str], Exception] = {}
        self.revived: list[str] = []
        self.catch_up: Callable[[Member], Any] = lambda member: None
        self._answers: dict[object, Any] = {}
        self.members = [self.started(f"rollout-{index}") for index in range(num_engines)]
        self.learner = self.started("learner-0")

    def started(self, name: str) -> Member:
        return Member(name, Handle(name, self))

    def called(self, handle: Handle, method: str, arguments: tuple[Any, ...]) -> object:
        self.calls.append((handle.name, method, arguments))
        ref = object()
        answer = self.faults.pop((handle.name, method), None) or (
            "id" if method == "join_transfers" and arguments == (None,) else f"{handle.name} has it"
        )
        if method == "export_weights":
            self._answers[ref] = answer if isinstance(answer, Exception) else NUM_BUCKETS
            return ref, f"handle of {handle.name}"
        self._answers[ref] = answer
        return ref

    def gather(self, calls: dict[object, Member], doing: str, limit_s: float, option: str = "") -> list[Any]:
        self.waits.append((doing, tuple(member.name for member in calls.values()), limit_s))
        answers = [self._answers[ref] for ref in calls]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def call(self, doing: str, call: Callable[[Any], object], may_stop: bool) -> list[Any]:
        return self.gather({call(member.handle): member for member in self.members}, doing, 0)

    def revive(self, lost: WorkerLost, may_stop: bool) -> Member:
        assert not may_stop  # a weight sync is waited for, whatever signal comes
        index = next(index for index, member in enumerate(self.members) if member.name == lost.name)
        self.revived.append(lost.name)
        self.members[index] = self.started(lost.name)
        self.catch_up(self.members[index])
        return self.members[index]

    def weights(self, version: int) -> PublishedWeights:
        return PublishedWeights(version, "aa", "the manifest", [], (self.learner,))

    def done(self) -> list[tuple[str, str]]:
        """Return who was called for what since the last time."""
        done, self.calls = [(name, method) for name, method, _ in self.calls], []
        return done
