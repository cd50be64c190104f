"""The trackers of a run as the driver sees them: a process each, which is watched, and waited for at the end alone."""

import contextlib
import os
import secrets
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ppo_ray import atomic, preflight
from ppo_ray.config import Config, load_config, tracking_problems
from ppo_ray.errors import InputError
from ppo_ray.events import Event, Report
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.follow import GAVE_UP, Sent, state_file
from ppo_ray.run.log import read_steps
from ppo_ray.run.resume import differences

_MAX_RESTARTS = 3
_BROKEN_S = 10.0  # of the wait after a run that was broken off: the processes go on in their own time
_MARGIN_S = 5.0  # beyond the time after which a tracker's process ends itself


class _Process:
    """The process of one tracker."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        """Start nothing yet."""
        self.name, self._folder = name, folder
        self._state, self._read_at = state_file(folder, name), -1
        self._process: subprocess.Popen[bytes] | None = None
        self.restarts = 0

    def start(self) -> None:
        """Start it; its output goes into a file beside its state, as it may be long and come at any time.

        Raises:
            OSError: the system has no room for it.
        """
        command = [sys.executable, "-P", "-m", "ppo_ray.run.follow", str(self._folder.path), self.name]
        with open(self._state.with_suffix(".log"), "ab", opener=atomic.open_no_link) as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C on the terminal is the driver's
            )

    def exit_code(self) -> int | None:
        """Return how it ended; None: it is at work."""
        return None if self._process is None else self._process.poll()

    def read_change(self) -> Sent | None:
        """Return what its tracker has been sent, where that changed since the last call."""
        try:
            changed_at = self._state.stat().st_mtime_ns
        except OSError:
            return None
        if changed_at == self._read_at:
            return None
        self._read_at = changed_at
        return Sent.read(self._state)

    def read(self) -> Sent:
        """Return what its tracker has been sent."""
        return Sent.read(self._state)

    def tell(self, how: str) -> None:
        """Tell it how the run ended; a pipe has room for a word."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone
                self._process.stdin.write(f"{how}\n".encode())
                self._process.stdin.close()

    def wait(self, limit_s: float, may_go_on: bool) -> int | None:
        """Wait until it has ended; returns its exit code.

        Args:
            limit_s: longest wait.
            may_go_on: leave it at work after that, so that it ends in its own time, and return None; else kill it and
                what it started.
        """
        if self._process is None:
            return None
        try:
            return self._process.wait(max(limit_s, 0))
        except subprocess.TimeoutExpired:
            if may_go_on:
                return None
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait(_MARGIN_S)


class Tracking:
    """All trackers of a run. No method raises, or waits for a tracker, but `end`, which waits."""

    def __init__(self, config: Config, folder: RunFolder, report: Report) -> None:
        """Take what the trackers follow; `start` starts them.

        Args:
            config: of the run.
            folder: of the run, with its config.yaml.
            report: is told once per tracker that something is wrong with it.
        """
        self._limit_s, self._folder, self._report = config.tracking.close_timeout_s, folder, report
        self._processes = [_Process(folder, name) for name in config.tracking.trackers]
        self._told: set[str] = set()

    def start(self) -> None:
        """Start a process for each tracker, which goes on where the tracker stopped."""
        path = self._folder.tracking / "run_id"
        if self._processes and not path.is_file():
            alphabet = string.ascii_lowercase + string.digits
            atomic.write_text(path, "".join(secrets.choice(alphabet) for _ in range(21)) + "\n")
        for process in self._processes:
            self._start(process)

    def check(self) -> None:
        """Start again what died, and tell what a tracker raised; a few system calls per tracker."""
        for process in self._processes:
            code = process.exit_code()
            if code is not None and process.restarts < _MAX_RESTARTS:
                self._restart(process, code)
            elif (sent := process.read_change()) and sent.problem:
                self._tell(process, f"{sent.problem}; it is tried again")

    def end(self, finished: bool) -> None:
        """Give the trackers their time to send what is left, all at once, and tell what each could not get.

        Args:
            finished: whether the run has made all its steps. Where it has not, it is waited for a moment only.
        """
        for process in self._processes:
            process.tell("finished" if finished else "broken")
        limit_s = self._limit_s + _MARGIN_S if finished else min(self._limit_s, _BROKEN_S)
        ends_at = time.monotonic() + limit_s
        for process in self._processes:
            code = process.wait(ends_at - time.monotonic(), may_go_on=not finished)
            while finished and code not in (0, GAVE_UP, None) and time.monotonic() < ends_at - _MARGIN_S:
                if process.restarts == _MAX_RESTARTS:
                    break
                self._restart(process, code)
                process.tell("finished")
                code = process.wait(ends_at - time.monotonic(), may_go_on=False)
            if code == 0 or (code is None and not finished):
                continue
            sent = process.read()
            lacks = sum(step["step"] >= sent.steps for step in read_steps(self._folder.path))
            why = sent.problem if code == GAVE_UP and sent.problem else f"its process ended (exit code {code})"
            what = f"it lacks {lacks} of the run's steps" if lacks else "it has all steps, and not the run's end"
            self._told.discard(process.name)
            self._tell(process, f"{why}; {what}, which `ppo-ray track CONFIG` sends")

    def _restart(self, process: _Process, code: int | None) -> None:
        process.restarts += 1
        self._tell(process, f"its process ended (exit code {code}) and is started again")
        self._start(process)

    def _start(self, process: _Process) -> None:
        try:
            process.start()
        except OSError as error:
            self._tell(process, f"its process could not be started: {error}")

    def _tell(self, process: _Process, what: str) -> None:
        """Report what is wrong with a tracker, once until its end."""
        if process.name not in self._told:
            self._told.add(process.name)
            log = state_file(self._folder, process.name).with_suffix(".log")
            where = log.relative_to(self._folder.path)
            with contextlib.suppress(OSError):  # a full disk
                self._report(Event("tracker_failed", f"tracker {process.name}: {what} ({where})", process.name))


@contextlib.contextmanager
def track(config: Config, folder: RunFolder, report: Report) -> Iterator[Tracking]:
    """Let the trackers follow a run while the block makes it; an error that ends the block is no end of the run."""
    tracking = Tracking(config, folder, report)
    tracking.start()
    finished = False
    try:
        yield tracking
        finished = True
    finally:
        tracking.end(finished)


def send_rest(config: Config, say: Callable[[str], None]) -> bool:
    """Send what the trackers of a run lack that is not under way; returns whether they have all now.

    Raises:
        InputError: there is no run or no tracker, the run is under way, or the config is another run's.
    """
    folder = RunFolder(Path(config.output_dir).absolute())
    if not folder.config.is_file():
        raise InputError(f"output_dir={config.output_dir}: holds no run")
    if not config.tracking.trackers:
        raise InputError("tracking.trackers: names none; give e.g. tracking.trackers=[wandb]")
    preflight.refuse(list(tracking_problems(config.tracking)), "nothing was sent")
    with folder.lock():
        changed = differences(load_config(folder.config, []), config)
        if others := [item for item in changed if not item.key.startswith(("tracking.", "resume", "output_dir"))]:
            lines = "".join(f"\n  {item}" for item in others)
            raise InputError(f"the run in {folder.path} has another config:{lines}")
        folder.write_config(config)
        with track(config, folder, lambda event: say(event.message)):
            pass
    num_steps = len(read_steps(folder.path))
    sent = {name: Sent.read(state_file(folder, name)) for name in config.tracking.trackers}
    for name, state in sent.items():
        say(f"{name} has {state.steps} of {num_steps} steps")
    return all(state.closed for state in sent.values())
