"""What the driver costs: `python benchmarks/control_plane.py [--workers 8 16 32 64] [--trajectories 100000]`.

The driver's loop, its groups and Ray's object store are the real ones; the workers have no models and answer at once
(`stub_workers.py`). So what is left of a step is the control plane, all on one machine. Each number of workers makes
all the trajectories, each worker `--per-worker` of them per step. Leaves `control_plane.json` and `control_plane.png`
in the folder `--output`; docs/internals.md says what they mean.
"""

import argparse
import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stub_workers import StubLearner, StubReward, StubRollout
from ppo_ray.config import Config
from ppo_ray.events import Event
from ppo_ray.learner.group import LearnerGroup
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.reward.group import RewardGroup
from ppo_ray.rollout.group import RolloutGroup
from ppo_ray.run.actors import Actors
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.loop import run_steps
from ppo_ray.run.run import Run

ROOT = Path(__file__).resolve().parents[1]
ROLLOUTS_A_REWARD = 8
MEMORY_EVERY = 10_000
WARM_UP_STEPS = 2
"""The first steps, which import and connect, are in no figure."""


@dataclass
class Measurement:
    """What the driver spent on one number of workers."""

    workers: int
    ranks: int
    batch_size: int
    steps: int = 0
    cpu_s: list[float] = field(default_factory=list)
    """Of the driver's process, for each step after the warm-up."""
    wall_s: list[float] = field(default_factory=list)
    memory: dict[int, float] = field(default_factory=dict)
    """MiB that are the driver's alone (USS), by the number of trajectories so far."""

    @property
    def figures(self) -> dict[str, float]:
        """Means over the steps."""
        steps = len(self.cpu_s)
        cpu_s, wall_s = sum(self.cpu_s) / steps, sum(self.wall_s) / steps
        return {
            "cpu_ms_a_step": 1e3 * cpu_s,
            "cpu_ms_a_step_and_worker": 1e3 * cpu_s / self.workers,
            "cpu_s_a_1000_trajectories": 1e3 * cpu_s / self.batch_size,
            "wall_s_a_step": wall_s,
            "wall_s_a_1000_trajectories": 1e3 * wall_s / self.batch_size,
            "memory_first_mib": next(iter(self.memory.values())),
            "memory_last_mib": list(self.memory.values())[-1],
        }


class WatchedRun(Run):
    """A run that looks at the driver's own process at the end of every step."""

    measurement: Measurement

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._process = psutil.Process()
        self._cpu_s = self._began = 0.0

    def end_step(self, step: int, update: UpdateReport) -> None:
        super().end_step(step, update)
        found = self.measurement
        cpu_s, now = sum(self._process.cpu_times()[:2]), time.monotonic()
        if step >= WARM_UP_STEPS:
            found.cpu_s.append(cpu_s - self._cpu_s)
            found.wall_s.append(now - self._began)
        before, after = step * found.batch_size, (step + 1) * found.batch_size
        if after // MEMORY_EVERY > before // MEMORY_EVERY or step + 1 == found.steps:
            found.memory[after] = self._process.memory_full_info().uss / 2**20
        self._cpu_s, self._began = sum(self._process.cpu_times()[:2]), time.monotonic()


class Letters:
    """A tokenizer of bytes; what a real one costs depends on the texts (docs/internals.md)."""

    def __call__(self, texts: list[str], verbose: bool, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}


def measure(workers: int, trajectories: int, folder: Path, per_worker: int = 32, ranks: int = 1) -> Measurement:
    """Let the driver make so many trajectories with so many workers; Ray must be up and have room for them."""
    pq.write_table(pa.table({"text": [f"text number {number}" for number in range(4096)]}), folder / "texts.parquet")
    steps = max(WARM_UP_STEPS + 1, -(-trajectories // (workers * per_worker)))
    config = _config(workers, per_worker, ranks, steps, folder)
    found = Measurement(workers, ranks, config.rollout.batch_size, steps)
    prompts = PromptStream(config.prompts, Letters(), config.seed)
    console = Console(file=(folder / "console.txt").open("w"))
    with WatchedRun.open(config, console, prompts) as run, _start(config, run.folder) as actors:
        run.measurement = found
        actors.rollout.load_weights(actors.learner.publish())
        run_steps(run, actors)
    return found


def _config(workers: int, per_worker: int, ranks: int, steps: int, folder: Path) -> Config:
    return Config.model_validate(
        {
            "steps": steps,
            "output_dir": str(folder / "run"),
            "model": {"path": "none"},
            "prompts": {"path": str(folder / "texts.parquet"), "min_tokens": 2, "max_tokens": 8},
            "rollout": {
                "engine": "hf",
                "workers": workers,
                "batch_size": workers * per_worker,
                "min_response_tokens": 4,
                "max_response_tokens": 16,
            },
            "reward": {"path": "none", "workers": -(-workers // ROLLOUTS_A_REWARD)},
            "learner": {"workers": ranks, "threads": 1},
            "checkpoint": {"every_steps": 0},
        }
    )


@contextlib.contextmanager
def _start(config: Config, folder: RunFolder) -> Iterator[Actors]:
    with contextlib.ExitStack() as stack:
        rollout = RolloutGroup(config, _raise, worker=StubRollout)
        stack.callback(rollout.close)
        reward = RewardGroup(config, _raise, worker=StubReward)
        stack.callback(reward.close)
        learner = LearnerGroup(config, folder.trajectories, _raise, worker=StubLearner)
        stack.callback(learner.close)
        for group in (rollout, reward, learner):
            group.setup()
        yield Actors(rollout, reward, learner)


def _raise(event: Event) -> None:
    """End a run in which something happens: its figures would be of that."""
    raise AssertionError(event.message)


@contextlib.contextmanager
def stub_cluster(num_actors: int) -> Iterator[None]:
    """Start a Ray that has room for so many actors, whatever cores this machine has."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once a process
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",  # an actor has a process of its own: those would only be in its way
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    with mock.patch.dict(os.environ, environment):
        ray.init(address="local", num_cpus=num_actors, object_store_memory=512 << 20, **quiet)
        try:
            yield
        finally:
            ray.shutdown()


def show(measurements: list[Measurement], console: Console) -> None:
    """Print the figures, a row a number of workers."""
    columns = {
        "cpu_ms_a_step": "CPU ms\nper step",
        "cpu_ms_a_step_and_worker": "CPU ms per step\nand worker",
        "cpu_s_a_1000_trajectories": "CPU s a 1,000\ntrajectories",
        "wall_s_a_step": "wall s\nper step",
        "wall_s_a_1000_trajectories": "wall s a 1,000\ntrajectories",
        "memory_first_mib": "USS MiB\nat first",
        "memory_last_mib": "USS MiB\nat last",
    }
    table = Table("workers", "ranks", "batch", "steps", *columns.values(), title="the driver")
    for found in measurements:
        counts = map(str, (found.workers, found.ranks, found.batch_size, found.steps))
        table.add_row(*counts, *(f"{found.figures[name]:.3g}" for name in columns))
    console.print(table)


def draw(measurements: list[Measurement], path: Path) -> None:
    """Draw CPU seconds over workers, and memory over trajectories."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    seconds = [found.figures["cpu_s_a_1000_trajectories"] for found in measurements]
    left.plot([found.workers for found in measurements], seconds, "o-")
    left.set(xlabel="rollout workers", ylabel="driver CPU, s a 1,000 trajectories", ylim=(0, None))
    for found in measurements:
        right.plot(list(found.memory), list(found.memory.values()), label=f"{found.workers} workers")
    right.set(xlabel="trajectories", ylabel="driver USS, MiB", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and leave the figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16, 32, 64], help="numbers of rollout workers")
    parser.add_argument("--trajectories", type=int, default=100_000, help="made by each number of workers")
    parser.add_argument("--per-worker", type=int, default=32, help="trajectories per step and worker")
    parser.add_argument("--ranks", type=int, default=1, help="learner ranks")
    parser.add_argument("--output", type=Path, default=Path("runs/control_plane"), help="folder for figures and plot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    measurements = []
    for workers in options.workers:
        with stub_cluster(2 * workers + options.ranks), tempfile.TemporaryDirectory() as folder:
            found = measure(workers, options.trajectories, Path(folder), options.per_worker, options.ranks)
        measurements.append(found)
        show(measurements[-1:], Console(stderr=True, width=120))
    show(measurements, Console(width=120))
    records = [{**asdict(found), **found.figures} for found in measurements]
    (options.output / "control_plane.json").write_text(json.dumps(records, indent=1))
    draw(measurements, options.output / "control_plane.png")


if __name__ == "__main__":
    main()
