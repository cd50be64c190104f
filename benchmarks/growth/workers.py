"""CPU seconds of the loop over Ray actors as there are more rollout workers, each with as many trajectories per step.

All is real: engines, learner, reward function, object store, weight syncs. What starts is not counted. Where workers
outnumber the cores they share them, so seconds are of CPU, of all processes together and of the driver alone.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.control_plane import stub_cluster
from benchmarks.growth.series import EPOCHS, Point, Scale, Series
from benchmarks.random_batches import score_by_length
from benchmarks.random_models import write_model
from ppo_ray.config import Config
from ppo_ray.events import Event
from ppo_ray.learner.reports import UpdateReport
from ppo_ray.prompts.stream import PromptStream
from ppo_ray.run.actors import launch
from ppo_ray.run.loop import run_steps
from ppo_ray.run.run import Run

WARM_UP_STEPS = 2
"""The first steps, in which processes import, connect and touch their memory, are in no figure."""


def over_workers(scale: Scale) -> list[Series]:
    """Measure the loop with each number of workers, a Ray for each."""
    everyone = Series("CPU of all processes", "rollout workers", "trajectory")
    driver = Series("CPU of the driver", "rollout workers", "trajectory")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_model(scale.shapes[0], path)
        texts = [f"w{number} w{number + 1} w{number + 2}" for number in range(500)]
        pq.write_table(pa.table({"text": texts}), Path(folder) / "texts.parquet")
        for workers in scale.workers:
            total, alone = _measure(workers, scale, Path(folder))
            work = workers * scale.workers_batch * scale.steps
            everyone.points.append(Point(workers, work, total))
            driver.points.append(Point(workers, work, alone))
    return [everyone, driver]


def _measure(workers: int, scale: Scale, folder: Path) -> tuple[float, float]:
    """Run the loop; returns the CPU seconds of all processes, and of the driver."""
    config = _config(workers, scale, folder)
    prompts = PromptStream(config.prompts, AutoTokenizer.from_pretrained(config.model.path), config.seed)
    with (
        (folder / "console.txt").open("w") as console,
        CPURun.open(config, Console(file=console), prompts) as run,
        stub_cluster(workers + 2 + config.learner.threads),
        launch(config, run.folder.trajectories, None, lambda line: None, _raise) as actors,
    ):
        actors.rollout.load_weights(actors.learner.publish())
        run_steps(run, actors)
    return run.everyone_s[-1] - run.everyone_s[WARM_UP_STEPS - 1], run.driver_s[-1] - run.driver_s[WARM_UP_STEPS - 1]


class CPURun(Run):
    """A run that looks at the CPU seconds of the driver, and of all processes it has started, at every step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.driver_s: list[float] = []
        self.everyone_s: list[float] = []

    def end_step(self, step: int, update: UpdateReport) -> None:
        super().end_step(step, update)
        others = psutil.Process().children(recursive=True)  # Ray's own processes, and by way of them all actors
        self.driver_s.append(time.process_time())
        self.everyone_s.append(time.process_time() + sum(sum(process.cpu_times()[:2]) for process in others))


def _config(workers: int, scale: Scale, folder: Path) -> Config:
    return Config.model_validate(
        {
            "steps": WARM_UP_STEPS + scale.steps,
            "output_dir": str(folder / f"run-{workers}"),
            "model": {"path": str(folder / "model")},
            "prompts": {"path": str(folder / "texts.parquet"), "min_tokens": 2, "max_tokens": 8},
            "rollout": {
                "engine": scale.engine,
                "workers": workers,
                "batch_size": workers * scale.workers_batch,
                "kv_cache_mib": 64,
                "stop_at_eos": False,
                "min_response_tokens": 4,
                "max_response_tokens": 16,
            },
            "reward": {"function": f"{score_by_length.__module__}:{score_by_length.__name__}"},
            "learner": {"threads": 2},
            "ppo": {"epochs": EPOCHS},
            "checkpoint": {"every_steps": 0},
        }
    )


def _raise(event: Event) -> None:
    """End a run in which something happens: its figures would be of that."""
    raise AssertionError(event.message)
