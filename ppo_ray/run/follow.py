"""The process of one tracker: it follows a run's folder and sends on what is new in it.

    python -m ppo_ray.run.follow RUN TRACKER

The driver sends it nothing. What it reads is metrics.jsonl and trajectories/, at its own pace, so that a tracker which
is slow or gone costs the run no time and loses no step. What it has sent is in RUN/tracking/TRACKER.json. Its standard
input tells how the run ends: `finished` or `broken`, or nothing where the driver was killed; then it sends the rest and
ends, or is ended after `tracking.close_timeout_s`.
"""

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ppo_ray import atomic
from ppo_ray.errors import first_line
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.trackers import Samples, TrackedRun, Tracker, load_tracker

GAVE_UP = 3
"""Exit code of a process whose tracker lacks something because it raised."""
_POLL_S = 1.0
_LONGEST_PAUSE_S = 60.0
_NICENESS = 10
_SAMPLE_COLUMNS = (
    *("sample_id", "prompt", "response", "score"),
    *("response_ids", "kl", "advantages", "finish_reason"),
)
"""That a tracker's table of responses is made of."""


@dataclass(frozen=True)
class Sent:
    """What a tracker has been sent."""

    steps: int = 0
    """Steps, so that the next has this number."""
    problem: str | None = None
    """What it raised last; None: nothing since a call that went well."""
    closed: bool = False
    """Whether the end of the run was sent too."""

    @classmethod
    def read(cls, path: Path) -> "Sent":
        """Read a file that `write` wrote; where there is none that can be read, nothing was sent."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        """Write it."""
        atomic.write_text(path, json.dumps(asdict(self)) + "\n")


def state_file(folder: RunFolder, tracker: str) -> Path:
    """Return where it is kept what a tracker has been sent."""
    return folder.tracking / f"{tracker.replace(':', '-')}.json"


class StepReader:
    """The steps in metrics.jsonl, read on from where the last call ended.

    A run that goes back to a checkpoint replaces the file: then it is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        """Read a file that may not be there yet."""
        self._path, self._place, self._file = path, 0, -1

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the number and the figures of each step that is new; what was not finite is left out."""
        try:
            with self._path.open("rb") as lines:
                status = os.fstat(lines.fileno())
                if status.st_ino != self._file or status.st_size < self._place:
                    self._place, self._file = 0, status.st_ino
                lines.seek(self._place)
                text = lines.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self._place += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int) and "event" not in record:
                    step = record.pop("step")
                    yield step, {name: value for name, value in record.items() if _is_figure(value)}


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Follower:
    """One tracker, and what it has been sent."""

    def __init__(self, folder: RunFolder, name: str, make: Callable[[], Tracker], run: TrackedRun) -> None:
        """Take what makes the tracker, which is not called yet."""
        self._folder, self._make, self._run = folder, make, run
        self._file = state_file(folder, name)
        self.sent = replace(Sent.read(self._file), closed=False, problem=None)
        self._options = run.config["tracking"]
        self._steps = StepReader(folder.metrics)
        self._waiting: dict[int, dict[str, float]] = {}
        self._tracker: Tracker | None = None

    def follow(self, ended: threading.Event, how: list[str]) -> bool:
        """Send steps until the run has ended and all are sent, or the tracker raises after that.

        Args:
            ended: is set when the run has ended.
            how: its first item says how, then.

        Returns:
            Whether the tracker has all.
        """
        pause = _POLL_S
        while True:
            is_last = ended.is_set()
            finished = is_last and how[0] == "finished"
            try:
                if self._tracker is None:
                    self._tracker = self._start()
                self._send(self._tracker, everything=finished)
                pause = _POLL_S
                if is_last:
                    self._end(self._tracker, finished)
                    return True
            except Exception as error:  # whatever a tracker raises
                self._note(problem=f"{type(error).__name__}: {first_line(error)}")
                if is_last:
                    if self._tracker is not None:
                        with contextlib.suppress(Exception):  # so that what it has is not lost with its process
                            self._tracker.close(finished)
                    return False
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            ended.wait(pause)

    def _start(self) -> Tracker:
        tracker = self._make()
        held = tracker.start(self._run)
        self._note(steps=self.sent.steps if held is None else held, problem=None)
        return tracker

    def _send(self, tracker: Tracker, everything: bool) -> None:
        self._waiting.update(self._steps.read())
        limit = math.inf if everything or not self._options["only_checkpointed"] else self._count_safe_steps()
        for step in sorted(self._waiting):
            if step >= limit:
                break
            if step >= self.sent.steps:
                tracker.log_step(step, self._waiting[step], self._read_samples(step))
                self._note(steps=step + 1, problem=None)
            del self._waiting[step]

    def _end(self, tracker: Tracker, finished: bool) -> None:
        if finished and self._folder.report.is_file():
            tracker.log_file(self._folder.report)
        tracker.close(finished)
        self._note(closed=finished)

    def _count_safe_steps(self) -> int:
        """Return how many steps the newest checkpoint holds: no start makes them again."""
        names = [re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.checkpoints.glob("step-*")]
        return max((int(name[1]) for name in names if name), default=0)

    def _read_samples(self, step: int) -> Samples | None:
        """Return the first responses of a step, where it is one whose responses are sent."""
        number, every = self._options["num_samples"], self._options["samples_every_steps"]
        if not number or step % every:
            return None
        import pyarrow as pa

        try:
            table = self._folder.read_step(step, _SAMPLE_COLUMNS).slice(0, number)
        except (OSError, pa.ArrowException) as error:
            print(f"step {step} has no table of responses: {first_line(error)}", flush=True)
            return None
        lists = {name: table.column(name).to_pylist() for name in ("response_ids", "kl", "advantages")}
        rows = []
        for index, row in enumerate(table.select(["sample_id", "prompt", "response", "score"]).to_pylist()):
            kl, advantages = lists["kl"][index], lists["advantages"][index]
            row["kl"] = sum(kl) if kl is not None else None
            row["advantage"] = sum(advantages) / len(advantages) if advantages else None
            row["tokens"] = len(lists["response_ids"][index])
            row["finish_reason"] = table.column("finish_reason")[index].as_py()
            rows.append({"step": step, **row})
        return rows

    def _note(self, **changes: Any) -> None:
        changed = replace(self.sent, **changes)
        if changed != self.sent:
            self.sent = changed
            self.sent.write(self._file)


def _watch_input(ended: threading.Event, how: list[str], limit_s: float) -> None:
    """Wait for the run's end; then leave the tracker its time, and end this process and what its library started."""
    how[0] = sys.stdin.readline().strip() or "broken"
    ended.set()
    time.sleep(limit_s)
    print(f"ended after tracking.close_timeout_s={limit_s:g}", flush=True)
    os.killpg(0, signal.SIGKILL)


def read_run(folder: RunFolder, tracker: str) -> tuple[TrackedRun, Mapping[str, Any]]:
    """Read what a tracker must know of a run, and the tracker's own options."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    own = state_file(folder, tracker).with_suffix("")
    own.mkdir(parents=True, exist_ok=True)
    run_id = (folder.tracking / "run_id").read_text(encoding="utf-8").strip()
    run = TrackedRun(run_id, folder.path.name, config["tracking"]["project"], config, own)
    return run, config["tracking"]["options"].get(tracker, {})


def main(path: str, tracker: str) -> int:
    """Follow a run until it ends; returns the exit code."""
    os.nice(_NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver's matter, who tells by this process's input
        signal.signal(number, signal.SIG_IGN)
    folder = RunFolder(Path(path))
    run, options = read_run(folder, tracker)
    ended, how = threading.Event(), [""]
    limit_s = run.config["tracking"]["close_timeout_s"]
    threading.Thread(target=_watch_input, args=(ended, how, limit_s), daemon=True).start()
    with atomic.lock(state_file(folder, tracker).with_suffix(".lock")):  # the one before may still be sending
        follower = Follower(folder, tracker, lambda: load_tracker(tracker, options), run)
        return 0 if follower.follow(ended, how) else GAVE_UP


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
