"""The errors that ppo_ray raises on purpose, each with the exit code that the command line gives it."""

import signal
from typing import Any

QUOTED = 60
"""Characters of a bad value that a message shows."""
_LINE = 500  # characters of a library's message, which may quote a whole file
NUM_LOGGED = 3
"""Texts of a batch whose failures are logged one by one; the others are counted."""


class PPORayError(Exception):
    """Base of every error that ppo_ray raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class InputError(PPORayError):
    """Input that cannot be used: an option, file, model, data set or output folder. No work has started."""

    exit_code = 2


class AssetError(PPORayError):
    """An offline asset that could not be built, or is not what it should be."""


class WorkerError(PPORayError):
    """An actor that failed, hung or answered wrongly; the message names it."""


class WorkerLost(WorkerError):
    """An actor that died, hangs or cannot be reached; another can take its place."""

    def __init__(self, message: str, name: str = "") -> None:
        """Name the worker, e.g. `"rollout-1"`."""
        super().__init__(message)
        self.name = name


class PeersLost(WorkerError):
    """Raised by a worker that cannot go on because another one that it works with is gone."""


class CheckpointError(PPORayError):
    """A checkpoint that could not be written, or is not whole."""


class UnreadableError(PPORayError):
    """A checkpoint that is there and cannot be read: whether it is whole is not known."""


class JobError(PPORayError):
    """A job that its cluster did not take, or that can no longer be followed."""


class Interrupted(PPORayError):
    """The end of a run by a signal; the exit code is 128 + the signal's number, as in shells."""

    def __init__(self, number: int) -> None:
        """Name the signal."""
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class NonFiniteError(WorkerError):
    """A loss or gradient that is not finite."""

    def __init__(self, message: str, trajectories: Any = None) -> None:
        """Keep the mini-batch that made it, a `pyarrow.Table` of `trajectory.LEARNED_SCHEMA`."""
        super().__init__(message)
        self.trajectories = trajectories


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, cut if it is long, or its class's name where there is no message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= _LINE else f"{line[:_LINE]}..."
