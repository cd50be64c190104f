"""The checkpoints of a run: when one is due, which is the newest whole one, which are kept."""

import contextlib
import json
from pathlib import Path

from ppo_ray import atomic
from ppo_ray.checkpoint import BEST, FINAL, LATEST, BeginSave, Pending, RunState, read_record, verify
from ppo_ray.config import CheckpointConfig
from ppo_ray.errors import CheckpointError
from ppo_ray.events import Event, Report

_SCORES = "scores.json"


class Checkpoints:
    """The checkpoints of a run: when one is due, which is the newest whole one, which are kept."""

    def __init__(self, folder: Path, config: CheckpointConfig, config_yaml: str, report: Report) -> None:
        """Manage a folder; it need not exist.

        Args:
            folder: of all checkpoints.
            config: when they are written and which are kept.
            config_yaml: goes into each.
            report: is told of those that are not whole.
        """
        self._folder, self._config, self._config_yaml, self._report = folder, config, config_yaml, report
        self._pending: tuple[Path, Pending] | None = None
        self._pending_score: float | None = None  # of the policy that is being written

    def is_due(self, step: int, num_steps: int) -> bool:
        """Say whether the state after so many steps is to be saved."""
        every = self._config.every_steps
        return step == num_steps or (every > 0 and step % every == 0)

    def path(self, step: int) -> Path:
        """Return the folder of the state after so many steps, whether it exists or not."""
        return self._folder / f"step-{step:05d}"

    def newest(self) -> tuple[Path, RunState] | None:
        """Return the newest checkpoint that is whole, verified; None if there is none.

        Newer ones that are not whole are renamed to `torn-...`.

        Raises:
            UnreadableError: one cannot be read.
        """
        for path in reversed(self._all()):
            try:
                verify(path)
                state = RunState.read(path)
            except CheckpointError as error:
                torn = path.with_name(f"torn-{path.name}")
                atomic.remove(torn)
                path.rename(torn)
                self._report(Event("torn_checkpoint", f"{error}; renamed to {torn.name}, the one before it is taken"))
            else:
                self._link(LATEST, path.name)  # who wrote it may have been killed before
                return path, state
        return None

    def save(self, state: RunState, begin: BeginSave) -> None:
        """Begin to write a state, unless it exists; `finish` waits for it. What was begun before is waited for here.

        Args:
            state: of the run.
            begin: calls `checkpoint.write` with these arguments where the learner is, and returns what waits for it.

        Raises:
            CheckpointError: the one before could not be written.
            WorkerError: the learner was lost, or late.
        """
        self.finish()
        path = self.path(state.step)
        if path.is_dir():
            self._link(LATEST, path.name)
        else:
            self._pending = path, begin(path, state, self._config_yaml)

    def finish(self, wait: bool = True) -> None:
        """Wait for what `save` began, link it as the latest, and remove checkpoints that need not be kept.

        Args:
            wait: false: if it is not written yet, do nothing.

        Raises:
            CheckpointError: it could not be written.
            WorkerError: the learner was lost, or late.
        """
        if self._pending is None or not (wait or self._pending[1].is_done()):
            return
        (path, pending), score = self._pending, self._pending_score
        self.abandon()
        pending.wait()
        self._link(LATEST, path.name)
        self._note_score(path.name, score)
        self._prune()

    def abandon(self) -> None:
        """Forget what `save` began: the learner that was writing it is lost."""
        self._pending = self._pending_score = None

    def note_score(self, step: int, score: float | None) -> None:
        """Note the mean score of a batch for the checkpoint whose policy sampled it, and link the best one.

        Args:
            step: steps that this policy had made; it need not have a checkpoint.
            score: of the batch; None: nothing was scored.
        """
        if self._pending is not None and self._pending[0] == self.path(step):
            self._pending_score = score  # is noted when it is written
        else:
            self._note_score(self.path(step).name, score)

    def _note_score(self, name: str, score: float | None) -> None:
        if self._config.keep_best and score is not None and (self._folder / name).is_dir():
            scores = self._scores() | {name: score}
            atomic.write_text(self._folder / _SCORES, json.dumps(scores, indent=1))
            self._link(BEST, max(scores, key=lambda name: scores[name]))

    def finish_run(self, step: int) -> None:
        """Link the state after the last step as `final`."""
        self._link(FINAL, self.path(step).name)

    def _link(self, name: str, target: str) -> None:
        try:
            atomic.link(self._folder / name, target)
        except OSError as error:
            raise CheckpointError(f"{self._folder / name} could not be made to point at {target}: {error}") from error

    def _all(self) -> list[Path]:
        """Return all checkpoints, whole or not, the oldest first."""
        found = [path for path in self._folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def _scores(self) -> dict[str, float]:
        try:
            scores = read_record(dict[str, float], self._folder / _SCORES)
        except CheckpointError:
            return {}
        return {name: score for name, score in scores.items() if (self._folder / name).is_dir()}

    def _prune(self) -> None:
        """Remove what is neither among the last ones nor the best nor final."""
        everything = self._all()
        kept = {path.name for path in everything[-self._config.keep_last :]}
        kept |= {link.readlink().name for name in (BEST, FINAL) if (link := self._folder / name).is_symlink()}
        # what somebody reads may have to stay on network storage, until the next time
        with contextlib.suppress(OSError):
            for path in everything:
                if path.name not in kept:
                    atomic.discard(path)
            for remnant in self._folder.glob(".step-*"):
                atomic.remove(remnant)
