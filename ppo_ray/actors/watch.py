"""Waiting for actors: with a limit, with control calls meanwhile, and with errors that tell who failed and where.

Actors fail in three ways: they die, they stop answering, they raise. The first two are `WorkerLost`: another worker can
do the same work. What they raise is an error of the work itself, which another worker would raise too; but after an
error of its GPU a process can compute nothing more, and is lost.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import ray

from ppo_ray import stopping
from ppo_ray.actors.worker import Whereabouts
from ppo_ray.errors import PPORayError, WorkerError, WorkerLost, first_line

_POLL_S = 1.0  # signal handlers run between polls
_PULSE_S = 0.5  # between checks of outstanding control calls
_PINGS_PER_LIMIT = 4
_SMALL_ANSWER_S = 60.0
_WHEREABOUTS_S = 5.0


class DependencyLost(WorkerError):
    """Raised when a call cannot begin because its input was lost with the worker or node that made it."""


@dataclass
class Member:
    """One actor of a group, as the driver knows it."""

    name: str
    handle: Any
    failures: int = 0
    """How often in a row it was lost, counting its predecessors of the same name."""
    _found: Whereabouts | None = None
    _asked: Any = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """Where it runs, as far as it has told."""
        self._listen()
        return str(self._found) if self._found else "not started: Ray has found no room for it yet, or is starting it"

    @property
    def host(self) -> str | None:
        """The name of its machine; None: it has not told yet."""
        self._listen()
        return self._found.host if self._found else None

    def ask(self) -> None:
        """Make a control call, unless one is under way."""
        if self._asked is None:
            self._asked = self.handle.whereabouts.remote()

    def has_answered(self) -> bool:
        """Say whether the last control call was answered, if only by the actor's death."""
        return self._asked is None or self._listen()

    @property
    def has_started(self) -> bool:
        """Whether it ever answered."""
        self._listen()
        return self._found is not None

    def wait_for_place(self) -> str:
        """Return where it runs, after it answered another call: wait a moment for the answer to the control call."""
        self._listen(_WHEREABOUTS_S)
        return self.place

    def _listen(self, patience_s: float = 0) -> bool:
        if self._asked is None or not ray.wait([self._asked], timeout=patience_s)[0]:
            return False
        with contextlib.suppress(ray.exceptions.RayError):  # its own call fails too, with the reason
            self._found = ray.get(self._asked, timeout=_SMALL_ANSWER_S)
        self._asked = None
        return True


@dataclass(frozen=True)
class Limits:
    """Limits of a wait, seconds."""

    answer_s: float
    """Until all answers are there."""
    ping_s: float
    """Until a control call is answered."""
    option: str = "ray.call_timeout_s (ray.start_timeout_s while starting)"
    """The config's name of the limit for all answers."""


Show = Callable[[str], contextlib.AbstractContextManager[None]]
"""Takes what workers do, e.g. `generating`; returns a block in which they are waited for."""

_show: ContextVar[Show] = ContextVar("show", default=lambda doing: contextlib.nullcontext())


@contextlib.contextmanager
def show_waits(show: Show) -> Iterator[None]:
    """Let somebody show what is waited for during the block."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


def watch(calls: Mapping[Any, Member], limits: Limits, doing: str, may_stop: bool = True) -> None:
    """Wait until all calls are answered; the first failure ends the wait at once.

    Args:
        calls: references to small answers, and the actors that give them.
        limits: of the wait.
        doing: what the workers do, for errors.
        may_stop: whether a request to stop the run ends the wait; the work is thrown away then.

    Raises:
        PPORayError: a worker raised it itself.
        WorkerLost: a worker died, does not answer a control call, or is late.
        DependencyLost: a call could not begin.
        WorkerError: a worker raised something else.
        Interrupted: the run is to be stopped.
    """
    with _show.get()(doing):
        _wait_for_all(calls, limits, doing, may_stop)


def _wait_for_all(calls: Mapping[Any, Member], limits: Limits, doing: str, may_stop: bool) -> None:
    began = time.monotonic()
    pulses = {member.name: _Pulse(member, began) for member in calls.values()}
    waiting, felt = list(calls), began
    while waiting:
        if may_stop:
            stopping.check()
        done, waiting = _wait_for_any(waiting)
        _raise_failures(done, calls, doing)
        if waiting and time.monotonic() - felt > _PULSE_S:
            felt = time.monotonic()
            for name in {calls[ref].name for ref in waiting}:
                pulses[name].check(limits.ping_s, doing)
        if waiting and time.monotonic() - began > limits.answer_s:
            late = {calls[ref].name: calls[ref] for ref in waiting}
            raise WorkerLost(
                f"{doing}: no answer within {limits.answer_s:g} s from "
                + "; ".join(f"{name} ({member.place})" for name, member in late.items())
                + f". Raise {limits.option} if that was too short",
                next(iter(late)),
            )


class _Pulse:
    """The control calls to one worker during a wait."""

    def __init__(self, member: Member, now: float) -> None:
        self._member, self._asked_at = member, now

    def check(self, limit_s: float, doing: str) -> None:
        """Ask at intervals; raise if there is no answer for too long. A worker that is starting has another limit."""
        now = time.monotonic()
        if self._member.has_answered():
            if now - self._asked_at > limit_s / _PINGS_PER_LIMIT:
                self._asked_at = now
                self._member.ask()
        elif self._member.has_started and now - self._asked_at > limit_s:
            raise WorkerLost(
                f"{self._member.name} ({self._member.place}), {doing}: did not answer a control call for {limit_s:g} s "
                "(ray.ping_timeout_s): it hangs, or its process is stopped",
                self._member.name,
            )


def _wait_for_any(waiting: list[Any]) -> tuple[list[Any], list[Any]]:
    """Wait for an answer and take all that have arrived: taken one by one, n answers would cost n^2 lookups."""
    done, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S, fetch_local=False)
    if done and waiting:
        more, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        done += more
    return done, waiting


def _raise_failures(done: list[Any], calls: Mapping[Any, Member], doing: str) -> None:
    """Raise the error of the first call that failed, if one did."""
    try:
        ray.get(done, timeout=_SMALL_ANSWER_S)
    except ray.exceptions.RayError:  # Ray does not tell which call it was
        for ref in done:
            _raise_failure(ref, calls[ref], doing)


def _raise_failure(ref: Any, member: Member, doing: str) -> None:
    """Raise the error of a call that has ended, if it failed."""
    try:
        ray.get(ref, timeout=_SMALL_ANSWER_S)
    except ray.exceptions.RayError as error:
        raise _translate(error, member, doing) from error


def _translate(error: Exception, member: Member, doing: str) -> PPORayError:
    """Translate an error of Ray's into one of ours."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    if isinstance(cause, PPORayError):
        cause.args = (f"{member.name}, {doing}: {cause}", *cause.args[1:])
        if isinstance(cause, WorkerLost) and not cause.name:
            cause.name = member.name  # a worker that reports its own loss
        return cause
    who = f"{member.name} ({member.wait_for_place()})"
    unreadable = isinstance(error, ray.exceptions.UnserializableException) or type(cause) is ray.exceptions.RayError
    if unreadable:  # the error cannot be pickled or unpickled; Ray has its text
        return WorkerError(f"{who} failed while {doing}: {error if cause is None else cause}")
    if isinstance(cause, ray.exceptions.RayError):
        return DependencyLost(f"{who}, {doing}: {type(cause).__name__}: {cause}")
    if cause is not None and type(cause).__name__ == "AcceleratorError":  # torch's, which the driver need not load
        return WorkerLost(f"{who} lost its GPU while {doing}: {first_line(cause)}", member.name)
    if cause is not None:
        return WorkerError(f"{who} failed while {doing}: {type(cause).__name__}: {cause}\n{error}")
    if isinstance(error, ray.exceptions.ObjectLostError):
        return DependencyLost(f"{who}, {doing}: its answer was lost: {error}")
    return WorkerLost(f"{who} was lost while {doing}: {_summarize(error)}", member.name)


def _summarize(error: Exception) -> str:
    """Return Ray's error in a few words; its own text is a page of ids and guesses."""
    text = str(error)
    if "worker process has died" in text:
        return "its process died (killed, out of memory, or crashed)"
    if "node has died" in text or "node died" in text:
        return "its node died"
    return f"{type(error).__name__}: {text.strip().splitlines()[0][:300] if text.strip() else 'no reason given'}"
