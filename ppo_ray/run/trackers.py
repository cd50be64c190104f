"""Experiment trackers behind one protocol: Weights & Biases, MLflow, Trackio, SwanLab, and classes of the user's own.

A tracker lives in a process of its own (`run/follow.py`), which alone imports its library. There it may block, raise or
die.
"""

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ppo_ray.config.file import flatten
from ppo_ray.config.tracking import find_class

Samples = Sequence[Mapping[str, Any]]
"""Rows of a table, one response each: all have the same columns, and cells are text, numbers or None."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers know it."""

    id: str
    """21 lower-case letters and digits, the same whenever the run goes on."""
    name: str
    """Of the run's folder."""
    project: str
    """`tracking.project`."""
    config: Mapping[str, Any]
    """The resolved config, by sections. It holds no secret."""
    folder: Path
    """For files of the tracker's own; it exists."""


class Tracker(Protocol):
    """What a tracker must do. Its class is called with `tracking.options` of its name.

    Methods are called one after another by one thread. What one raises is said in the run's output; the same call is
    made again later.
    """

    def start(self, run: TrackedRun) -> int | None:
        """Open the tracker's run of this id, or go on with it.

        Returns:
            How many steps the tracker holds of it, so that the next to be sent has this number. None: it cannot tell;
            then it is how many were sent.
        """
        ...

    def log_step(self, step: int, metrics: Mapping[str, float], samples: Samples | None) -> None:
        """Take a step's figures, by their names in metrics.jsonl, and every few steps a table of responses.

        Steps come in order, each once. A figure that was not finite is left out.
        """
        ...

    def log_file(self, path: Path) -> None:
        """Take a file at the run's end, e.g. its report."""
        ...

    def close(self, finished: bool) -> None:
        """Send what is left, and mark the run as finished or as broken off."""
        ...


def load_tracker(name: str, options: Mapping[str, Any]) -> Tracker:
    """Make a tracker by its name in `tracking.trackers`."""
    built_in = {"wandb": WandbTracker, "mlflow": MlflowTracker, "trackio": TrackioTracker, "swanlab": SwanlabTracker}
    return (built_in.get(name) or find_class(name))(**options)


class WandbTracker:
    """Weights & Biases, online or offline (`mode`, or WANDB_MODE)."""

    def __init__(self, **options: Any) -> None:
        """Take arguments of `wandb.init`."""
        self._options = options
        self._run: Any = None

    def start(self, run: TrackedRun) -> int | None:
        """Begin or resume the run of this id; an offline one is found in the folder."""
        import wandb

        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False)
        given = {"name": run.name, "project": run.project, "settings": settings} | self._options
        given |= {"id": run.id, "config": dict(run.config), "dir": str(run.folder), "resume": "allow"}
        held = count_wandb_steps(run.folder)
        self._run = wandb.init(**given)
        return max(held, self._run.starting_step or 0)

    def log_step(self, step: int, metrics: Mapping[str, float], samples: Samples | None) -> None:
        """Log all in one row of the run's history."""
        import wandb

        row: dict[str, Any] = dict(metrics)
        if samples:
            columns = list(samples[0])
            row["samples"] = wandb.Table(columns=columns, data=[[line[name] for name in columns] for line in samples])
        self._run.log(row, step=step, commit=True)

    def log_file(self, path: Path) -> None:
        """Save a file with the run; a page is shown beside its charts too."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, finished: bool) -> None:
        """End the run; a broken one has the exit code 1."""
        self._run.finish(exit_code=0 if finished else 1)


def count_wandb_steps(folder: Path) -> int:
    """Return how many steps the offline stores of Weights & Biases below a folder hold: 1 + the last one's number."""
    from wandb.proto import wandb_internal_pb2

    steps = 0
    for path in folder.glob("wandb/*run-*/run-*.wandb"):
        for data in read_store(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                steps = max(steps, record.history.step.num + 1)
    return steps


def read_store(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline store of Weights & Biases or SwanLab, up to one that was cut off.

    Both are LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB, in which each part of a record follows
    its checksum, length and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # too short for a part: padding
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part = data[place + 7 : place + 7 + length]
        if kind not in (1, 2, 3, 4) or len(part) < length:
            return
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield record
        place += 7 + length


class MlflowTracker:
    """MLflow: a server or a database (`tracking_uri`, or MLFLOW_TRACKING_URI)."""

    def __init__(self, tracking_uri: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Take the address of the server or database, and tags of the run."""
        self._uri, self._tags = tracking_uri, dict(tags or {})

    def start(self, run: TrackedRun) -> int | None:
        """Find the run by a tag with its id, or make it; its parameters are logged once, as MLflow asks."""
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient(tracking_uri=self._uri)
        experiment = self._client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        found = self._client.search_runs([place], f"tags.ppo_ray_run = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = self._tags | {"ppo_ray_run": run.id}
            self._id = self._client.create_run(place, run_name=run.name, tags=tags).info.run_id
            params = [Param(self._name(key), str(value)[:500]) for key, value in flatten(run.config)]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[first : first + 100])
        self._client.log_dict(self._id, dict(run.config), "config.yaml")
        return max((item.step + 1 for item in self._client.get_metric_history(self._id, "time/step_s")), default=0)

    def log_step(self, step: int, metrics: Mapping[str, float], samples: Samples | None) -> None:
        """Log the figures at once; a table is the artifact samples/step-00010.json, as `mlflow.load_table` reads it."""
        if samples:
            columns = list(samples[0])
            table = {"columns": columns, "data": [[row[name] for name in columns] for row in samples]}
            self._client.log_dict(self._id, table, f"samples/step-{step:05d}.json")
        now = int(time.time() * 1000)
        figures = [self._metric(self._name(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=figures)

    def log_file(self, path: Path) -> None:
        """Log an artifact."""
        self._client.log_artifact(self._id, str(path))

    def close(self, finished: bool) -> None:
        """End the run with its status."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")

    @staticmethod
    def _name(text: str) -> str:
        """Return a name as MLflow allows it: `eval/pass@4` is `eval/pass_4`."""
        return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in text)


class TrackioTracker:
    """Trackio: a database of this account, a server or a Space (`server_url`, `space_id`)."""

    def __init__(self, **options: Any) -> None:
        """Take arguments of `trackio.init`."""
        self._options = options
        self._run: Any = None

    def start(self, run: TrackedRun) -> int | None:
        """Begin or resume the run, whose name ends with its id."""
        import trackio

        given = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False} | self._options
        given |= {"project": run.project, "name": f"{run.name}-{run.id[:6]}", "config": dict(run.config)}
        self._run = trackio.init(resume="allow", **given)
        return getattr(self._run, "_next_step", None)  # there is no public name for it

    def log_step(self, step: int, metrics: Mapping[str, float], samples: Samples | None) -> None:
        """Log all in one row of its database."""
        row: dict[str, Any] = dict(metrics)
        if samples:
            import pandas as pd
            import trackio

            row["samples"] = trackio.Table(dataframe=pd.DataFrame(list(samples)))
        self._run.log(row, step=step)

    def log_file(self, path: Path) -> None:
        """Log an artifact of the run."""
        self._run.log_artifact(str(path), name=path.stem, type="report")

    def close(self, finished: bool) -> None:
        """Write what is in the queue."""
        self._run.finish()


class SwanlabTracker:
    """SwanLab, online or offline (`mode`)."""

    def __init__(self, **options: Any) -> None:
        """Take arguments of `swanlab.init`."""
        self._options = options

    def start(self, run: TrackedRun) -> int | None:
        """Begin the run, or resume it online; offline its folder has a part of the same id for each start."""
        import swanlab

        given = {"name": run.name, "project": run.project, "log_dir": str(run.folder)} | self._options
        given |= {"id": run.id, "config": dict(run.config), "resume": "allow"}
        held = self._count_steps(run.folder)
        return held if swanlab.init(**given).mode == "offline" else None

    @staticmethod
    def _count_steps(folder: Path) -> int:
        """Return how many steps the offline stores below a folder hold whole: up to the last figure of a row."""
        from swanlab.proto.swanlab.record.v1 import record_pb2

        steps = 0
        for path in folder.glob("run-*/run-*.swanlab"):
            for data in read_store(path):
                record = record_pb2.Record()
                record.ParseFromString(data)
                if record.WhichOneof("record_type") == "scalar" and record.scalar.key == "time/step_s":
                    steps = max(steps, record.scalar.step + 1)
        return steps

    def log_step(self, step: int, metrics: Mapping[str, float], samples: Samples | None) -> None:
        """Log figures, and each response as a text under its prompt."""
        import swanlab

        row: dict[str, Any] = dict(metrics)
        if samples:
            texts = [f"{line['prompt']}\n---\n{line['response']}" for line in samples]
            row["samples"] = [
                swanlab.Text(text, caption=f"score {line['score']}") for text, line in zip(texts, samples, strict=True)
            ]
        swanlab.log(row, step=step)

    def log_file(self, path: Path) -> None:
        """Save a file with the run."""
        import swanlab

        swanlab.save(str(path), base_path=str(path.parent))

    def close(self, finished: bool) -> None:
        """End the run."""
        import swanlab

        swanlab.finish(**({} if finished else {"state": "aborted"}))
