"""Waiting for actors: bounded, with a control call now and then, and an error that says who, where and what.

Actors fail in three ways: they die, they stop answering, they raise. The first two are `WorkerLost`: another worker can
do the same. What they raise is an error of the work itself, which another worker would meet too.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from ppo_ray import stopping
from ppo_ray.actors.worker import Whereabouts
from ppo_ray.errors import PPORayError, WorkerError, WorkerLost

_POLL_S = 1.0  # signal handlers run between polls
_PULSE_S = 0.5  # between looks at who owes the answer to a control call
_PINGS_A_LIMIT = 4
_SMALL_ANSWER_S = 60.0
_WHEREABOUTS_S = 5.0


class DependencyLost(WorkerError):
    """Say that a call could not begin because what it was to work on is gone with the worker or node that made it."""


@dataclass
class Member:
    """One actor of a group as the driver knows it."""

    name: str
    handle: Any
    failures: int = 0
    """How often in a row it was lost, its predecessors of the same name included."""
    _found: Whereabouts | None = None
    _asked: Any = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """Where it runs, as far as it has said."""
        self._listen()
        return str(self._found) if self._found else "not started: Ray has found no room for it yet, or is starting it"

    def ask(self) -> None:
        """Make a control call, unless one is under way."""
        if self._asked is None:
            self._asked = self.handle.whereabouts.remote()

    def answered(self) -> bool:
        """Say whether the last control call was answered, if only by the actor's death."""
        return self._asked is None or self._listen()

    @property
    def has_started(self) -> bool:
        """Whether it ever answered."""
        self._listen()
        return self._found is not None

    def told_place(self) -> str:
        """Say where it runs once it has answered another call: its word of that may be on its way still."""
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
    """How long is waited."""

    answer_s: float
    """For all answers."""
    ping_s: float
    """For the answer to a control call."""
    option: str = "ray.call_timeout_s (ray.start_timeout_s while starting)"
    """What says so for all answers."""


def watch(calls: Mapping[Any, Member], limits: Limits, doing: str, may_stop: bool = True) -> None:
    """Wait until all calls are answered; the first failure ends the wait at once, whoever else is still at work.

    Args:
        calls: references to answers that are small, and whose they are.
        limits: how long.
        doing: what the workers do, for errors.
        may_stop: whether a request to stop the run ends the wait; the work is thrown away then.

    Raises:
        PPORayError: a worker raised it itself.
        WorkerLost: a worker died, does not answer a control call, or is late.
        DependencyLost: a call could not begin.
        WorkerError: a worker raised something else.
        Interrupted: the run is to be stopped.
    """
    began = time.monotonic()
    pulses = {member.name: _Pulse(member, began) for member in calls.values()}
    waiting, felt = list(calls), began
    while waiting:
        if may_stop:
            stopping.check()
        done, waiting = _answered(waiting)
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
    """The control calls to one worker while it is waited for."""

    def __init__(self, member: Member, now: float) -> None:
        self._member, self._asked_at = member, now

    def check(self, limit_s: float, doing: str) -> None:
        """Ask now and then; raise if there was no answer for too long. Who is not up yet has the start's own limit."""
        now = time.monotonic()
        if self._member.answered():
            if now - self._asked_at > limit_s / _PINGS_A_LIMIT:
                self._asked_at = now
                self._member.ask()
        elif self._member.has_started and now - self._asked_at > limit_s:
            raise WorkerLost(
                f"{self._member.name} ({self._member.place}), {doing}: did not answer a control call for {limit_s:g} s "
                "(ray.ping_timeout_s): it hangs, or its process is stopped",
                self._member.name,
            )


def _answered(waiting: list[Any]) -> tuple[list[Any], list[Any]]:
    """Wait for an answer and take all that are there, lest n answers cost n looks at n references."""
    done, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S, fetch_local=False)
    if done and waiting:
        more, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        done += more
    return done, waiting


def _raise_failures(done: list[Any], calls: Mapping[Any, Member], doing: str) -> None:
    """Raise what went wrong with the first answer that is none."""
    try:
        ray.get(done, timeout=_SMALL_ANSWER_S)
    except ray.exceptions.RayError:  # which of them it was is not told
        for ref in done:
            _raise_failure(ref, calls[ref], doing)


def _raise_failure(ref: Any, member: Member, doing: str) -> None:
    """Raise what went wrong with an answer that is there."""
    try:
        ray.get(ref, timeout=_SMALL_ANSWER_S)
    except ray.exceptions.RayError as error:
        raise _failure(error, member, doing) from error


def _failure(error: Exception, member: Member, doing: str) -> PPORayError:
    """Return what to raise for an error of Ray's."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    if isinstance(cause, PPORayError):
        cause.args = (f"{member.name}, {doing}: {cause}", *cause.args[1:])
        if isinstance(cause, WorkerLost) and not cause.name:
            cause.name = member.name  # who says of itself that it is lost
        return cause
    who = f"{member.name} ({member.told_place()})"
    unreadable = isinstance(error, ray.exceptions.UnserializableException) or type(cause) is ray.exceptions.RayError
    if unreadable:  # what the work raised cannot be pickled, or not be made again from it; Ray has its text
        return WorkerError(f"{who} failed while {doing}: {error if cause is None else cause}")
    if isinstance(cause, ray.exceptions.RayError):
        return DependencyLost(f"{who}, {doing}: {type(cause).__name__}: {cause}")
    if cause is not None:
        return WorkerError(f"{who} failed while {doing}: {type(cause).__name__}: {cause}\n{error}")
    if isinstance(error, ray.exceptions.ObjectLostError):
        return DependencyLost(f"{who}, {doing}: its answer was lost: {error}")
    return WorkerLost(f"{who} was lost while {doing}: {_said_shortly(error)}", member.name)


def _said_shortly(error: Exception) -> str:
    """Say Ray's error in a few words; its own text is a page of ids and guesses."""
    text = str(error)
    if "worker process has died" in text:
        return "its process died (killed, out of memory, or crashed)"
    if "node has died" in text or "node died" in text:
        return "its node died"
    return f"{type(error).__name__}: {text.strip().splitlines()[0][:300] if text.strip() else 'no reason given'}"
