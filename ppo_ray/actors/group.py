"""A group of actors of one kind: it launches, calls, replaces and closes them."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray

from ppo_ray.actors.placement import Seats
from ppo_ray.actors.watch import Limits, Member, watch
from ppo_ray.config import RayConfig
from ppo_ray.errors import WorkerError, WorkerLost
from ppo_ray.events import Event, Report
from ppo_ray.plan import ActorSpec
from ppo_ray.plan.demand import actor_name

_CLOSE_S = 10.0

Call = Callable[[Any], Any]
"""Takes an actor's handle, calls one of its methods, returns the reference to the answer."""


class ActorGroup:
    """Actors of one kind: `rollout-0`, `rollout-1`, ...

    The actors are light to construct; then all import their modules at once. `setup` does the heavy work, so that a
    failure there keeps its own error. Ray never restarts an actor: the group kills what is left of a lost one, starts
    another under its name, and brings it to the same state.
    """

    def __init__(
        self, actor_class: Any, spec: ActorSpec, config: RayConfig, report: Report, seats: Seats | None = None
    ) -> None:
        """Create the actors without waiting for them.

        Args:
            actor_class: a Ray actor class over `Worker`; its `setup` prepares it.
            spec: their number, and the resources of each.
            config: time limits, and how often a lost actor is replaced.
            report: is called with every replacement.
            seats: where they and their successors are placed; None: Ray decides.
        """
        self._seats = seats or Seats()
        self._class, self._spec, self._config, self._report = actor_class, spec, config, report
        self.members = [self._launch(actor_name(spec.key, index)) for index in range(spec.workers)]
        self.setup_args: tuple[Any, ...] = ()
        """The arguments of `setup`; a replacement is set up with them."""
        self.catch_up: Callable[[Member], None] = lambda member: None
        """Brings a replacement that is set up to the state of the others."""

    def setup(self, *args: Any) -> list[Any]:
        """Set up all actors at once and wait until each is ready; one that is lost meanwhile is replaced."""
        self.setup_args = args
        refs = {member.handle.setup.remote(*args): member for member in self.members}
        while True:
            try:
                watch(refs, self._start_limits, "starting")
                break
            except WorkerLost as lost:
                member = self._replace(lost)
                refs = {ref: other for ref, other in refs.items() if other is not member}
                refs[member.handle.setup.remote(*args)] = member
        for member in self.members:
            member.wait_for_place()  # so that an error of its first call can tell it
        order = {member.name: ref for ref, member in refs.items()}
        return ray.get([order[member.name] for member in self.members], timeout=self._config.start_timeout_s)

    def call(self, doing: str, call: Call, may_stop: bool = True) -> list[Any]:
        """Make the same call on all actors and wait for their answers, in order; a lost one's is made again.

        Raises:
            WorkerError: as `watch`, or a worker was lost too often.
        """
        return self._call(doing, call, len(self.members), may_stop)

    def call_first(self, doing: str, call: Call) -> Any:
        """Make a call on the first actor alone; see `call`."""
        return self._call(doing, call, 1)[0]

    def watch(self, calls: dict[Any, Member], doing: str, may_stop: bool = True) -> None:
        """Wait for calls, as `actors.watch.watch` does; workers that answered are counted as healthy again."""
        watch(calls, Limits(self._config.call_timeout_s, self._config.ping_timeout_s), doing, may_stop)
        for member in calls.values():
            member.failures = 0

    def gather(
        self, calls: dict[Any, Member], doing: str, limit_s: float, option: str = "ray.transfer_timeout_s"
    ) -> list[Any]:
        """Wait for calls that belong together, of this group's actors and of others, and return their answers.

        Args:
            calls: as `watch`.
            doing: what they do, for errors.
            limit_s: longest wait.
            option: the config's name of that limit.

        Raises:
            WorkerError: as `watch`. Nobody is replaced, and nobody counts as healthy again: this may be half of a call.
        """
        limits = Limits(limit_s, self._config.ping_timeout_s, option)
        watch(calls, limits, doing, may_stop=False)
        return ray.get(list(calls), timeout=limit_s)

    def watch_start(self, calls: dict[Any, Member], doing: str = "starting") -> None:
        """Wait for calls of the start, as `watch` does; lost workers are not replaced."""
        watch(calls, self._start_limits, doing)

    def revive(self, lost: WorkerLost, may_stop: bool = True) -> Member:
        """Replace a lost worker and bring its successor to the state of the others.

        Args:
            lost: names the worker.
            may_stop: whether a request to stop the run ends the wait.

        Raises:
            WorkerError: it was lost too often in a row (`ray.max_restarts`), or its successor fails to start.
        """
        began = time.monotonic()
        while True:
            member = self._replace(lost)
            try:
                ready = member.handle.setup.remote(*self.setup_args)
                watch({ready: member}, self._start_limits, "starting again", may_stop)
                member.wait_for_place()
                seconds = time.monotonic() - began
                message = f"{member.name} was replaced in {seconds:.1f} s: {lost}"
                self._report(Event("worker_replaced", message, member.name))
                self._catch_up(member)
                return member
            except WorkerLost as again:
                if again.name != member.name:
                    raise
                lost = again

    def launch_again(self, lost: WorkerLost) -> None:
        """Kill all workers and launch others under their names, where the rest is useless without the lost one.

        Raises:
            WorkerError: it was lost too often in a row.
        """
        replaced = self._replace(lost)
        for index, member in enumerate(self.members):
            if member is not replaced:
                _kill(member)
                self.members[index] = self._launch(member.name)
                self.members[index].failures = member.failures

    def close(self) -> None:
        """Ask every actor to close, and end its process; one that does not answer in time is killed. Never raises."""
        with contextlib.suppress(ray.exceptions.RayError):
            refs = [member.handle.close.remote() for member in self.members]
            ray.wait(refs, num_returns=len(refs), timeout=_CLOSE_S, fetch_local=False)
        for member in self.members:
            _kill(member)
        self.members = []

    def _catch_up(self, member: Member) -> None:
        """Bring a replacement to the state of the others; this is not yet the work that its predecessor died at."""
        failures = member.failures
        try:
            self.catch_up(member)
        finally:
            member.failures = failures

    @property
    def _start_limits(self) -> Limits:
        return Limits(self._config.start_timeout_s, self._config.start_timeout_s)

    def _call(self, doing: str, call: Call, num_members: int, may_stop: bool = True) -> list[Any]:
        refs = [call(member.handle) for member in self.members[:num_members]]
        while True:
            try:
                self.watch(dict(zip(refs, self.members, strict=False)), doing, may_stop)
                return ray.get(refs, timeout=self._config.call_timeout_s)
            except WorkerLost as lost:
                member = self.revive(lost, may_stop)
                refs[self.members.index(member)] = call(member.handle)

    def _launch(self, name: str) -> Member:
        options = self._spec.options(name) | self._seats.options(name)
        member = Member(name, self._class.options(**options).remote(name))
        member.ask()
        member.handle.import_ahead.remote(*self._spec.modules)
        return member

    def _replace(self, lost: WorkerLost) -> Member:
        """Kill what is left of a lost worker and launch another under its name."""
        index = next(index for index, member in enumerate(self.members) if member.name == lost.name)
        failures = self.members[index].failures + 1
        if failures > self._config.max_restarts:
            raise WorkerError(
                f"{lost.name} was lost {failures} times in a row (ray.max_restarts={self._config.max_restarts}); "
                f"the last time: {lost}"
            ) from lost
        _kill(self.members[index])
        self.members[index] = self._launch(lost.name)
        self.members[index].failures = failures
        return self.members[index]


def _kill(member: Member) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(member.handle, no_restart=True)
