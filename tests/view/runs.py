"""Folders of runs, written as a run writes them but without one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ppo_ray import trajectory
from ppo_ray.config import load_config
from ppo_ray.events import ActorReport, Event
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.log import MetricsLog

ROWS = 8


def make_run(path: Path, num_steps: int = 3, responses: Mapping[int, Sequence[str]] | None = None) -> Path:
    """Write a run of `ROWS` responses per step, of which the last has no score; `responses` are a step's texts."""
    overrides = [f"output_dir={path}", "model.path=no/where", "prompts.path=p", "reward.path=r", "steps=5"]
    folder = RunFolder.create(path)
    folder.write_config(load_config(None, overrides))
    with MetricsLog(path) as log:
        for step in range(num_steps):
            log.write(step, measure(step), report_actors(step))
            write_step(path, step, (responses or {}).get(step))
            if step == 1:
                log.event(Event("worker_replaced", "rollout-0 was lost", "rollout-0"))
    evaluate = {
        "std_score": 0.5,
        "num_prompts": 1,
        "num_unscored": 0,
        "samples": [{"prompt": "held <b>out</b>", "response": "resp", "score": 0.25}],
        "figures": {"eval/score_mean": 0.25},
        "sets": {},
    }
    folder.before.write_text(json.dumps({"mean_score": 0.25, **evaluate}))
    return path


def measure(step: int) -> dict[str, float]:
    return {
        "score/mean": step / 2,
        "score/std": 1.0,
        "kl/per_sequence": 0.5 * step,
        "policy/clip_fraction": 0.1 if step else 0.5,  # beyond its healthy range at step 0
        "policy/optimizer_steps": 4.0,
        "policy/entropy": float("nan"),
        "time/generate_s": 1.0,
        "time/update_s": 2.0,
    }


def report_actors(step: int) -> dict[str, ActorReport]:
    """Return what each actor did in a step: two rollout workers, of which the first grows, and a learner on a GPU."""
    rollout = {
        f"rollout-{index}": ActorReport(
            f"node-{index}", {"time/generate_s": 1.0 - 0.5 * index, "memory/rollout_gib": 2.0 + step * (1 - index)}
        )
        for index in range(2)
    }
    memory = {"memory/learner_gib": 4.0, "memory/learner_peak_gib": 5.0, "memory/learner_gpu_reserved_gib": 7.5 - step}
    return rollout | {"learner-0": ActorReport(None, {"time/learn_s": 2.0, **memory})}


def append_step(path: Path, step: int) -> None:
    """Make one step more, as a run under way does."""
    write_step(path, step)
    with MetricsLog(path) as log:
        log.write(step, measure(step), report_actors(step))


def write_step(path: Path, step: int, responses: Sequence[str] | None = None) -> Path:
    file = RunFolder(path).trajectory_file(step)
    pq.write_table(make_step(step, responses), file)
    return file


def make_step(step: int, responses: Sequence[str] | None = None) -> pa.Table:
    """Make a step's trajectories: row i has i + 1 tokens, the score i, and a KL of `step` per token."""
    texts = responses or [f"response {step} {index}" for index in range(ROWS)]
    rows = [
        {
            "sample_id": step * ROWS + index,
            "step": step,
            "policy_version": step,
            "worker": f"rollout-{index % 2}",
            "seed": 2**60 + index,
            "prompt": f"prompt {index}",
            "response": text,
            "prompt_ids": [1, 2],
            "response_ids": list(range(index + 1)),
            "rollout_logprobs": [-0.5] * (index + 1),
            "finish_reason": "stop" if index % 2 else "length",
        }
        for index, text in enumerate(texts)
    ]
    scores = [None if index == len(rows) - 1 else float(index) for index in range(len(rows))]
    parts = {"style": [0.5 * (score or 0) for score in scores], "length": scores}
    table = trajectory.with_scores(
        trajectory.with_parts(trajectory.from_rows(rows), parts, {"style": 1, "length": 1}), scores
    )

    def repeat(value: float) -> list[np.ndarray | None]:
        return [None if score is None else np.full(index + 1, value, np.float32) for index, score in enumerate(scores)]

    figures = {name: repeat(step if name == "kl" else 0.25) for name in trajectory.LEARNED_FIELDS}
    return trajectory.with_learned(table, figures)


def row_of(page: Any, **facts: Any) -> Any:
    """Return the only row of a page with these facts."""
    (found,) = [row for row in page.rows if all(row[name] == value for name, value in facts.items())]
    return found
