"""The errors ppo_ray raises on purpose, and the exit code that the command line gives each."""

import signal
from typing import Any


class PPORayError(Exception):
    """Base of every error that ppo_ray raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class InputError(PPORayError):
    """Say that what the user gave (option, file, model, data, output folder) cannot be used; no work has started."""

    exit_code = 2


class AssetError(PPORayError):
    """Say that an offline asset could not be built or is not what it should be."""


class WorkerError(PPORayError):
    """Say that an actor failed, hung or answered wrongly; the message names it."""


class WorkerLost(WorkerError):
    """Say that an actor died, hangs or cannot be reached; another can take its place."""

    def __init__(self, message: str, name: str = "") -> None:
        """Name the worker, e.g. `"rollout-1"`."""
        super().__init__(message)
        self.name = name


class PeersLost(WorkerError):
    """Say that this worker cannot go on because one that it works with is gone."""


class CheckpointError(PPORayError):
    """Say that a checkpoint could not be written or is not whole."""


class UnreadableError(PPORayError):
    """Say that a checkpoint is there and cannot be read, so that nobody knows whether it is whole."""


class JobError(PPORayError):
    """Say that a job was not taken by its cluster, or can no longer be followed."""


class Interrupted(PPORayError):
    """Say that a signal ended the run; the command line exits as shells have it, with 128 + its number."""

    def __init__(self, number: int) -> None:
        """Name the signal."""
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class NonFiniteError(WorkerError):
    """Say that a loss or its gradient is not finite."""

    def __init__(self, message: str, trajectories: Any = None) -> None:
        """Keep the mini-batch that made it, a `pyarrow.Table` of `trajectory.LEARNED_SCHEMA`."""
        super().__init__(message)
        self.trajectories = trajectories
