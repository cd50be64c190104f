"""ppo_ray's arms: a whole `python -m ppo_ray train` by the demo's config, and what its metrics say.

Nothing is held out and no checkpoint is written during the steps; one is written at the end, as always, and removed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.compare.arms import OURS, OURS_BFLOAT16, Step
from benchmarks.compare.settings import Settings
from ppo_ray import trajectory
from ppo_ray.config import Config, UpdateConfig, load_config

CONFIG = Path(__file__).parents[2] / "configs" / "imdb.yaml"


@dataclass(frozen=True)
class Shape:
    """What a step works on."""

    batch_size: int
    """Samples per step, where none are asked for."""
    steps: int
    """Of a run, where none are asked for."""
    options: dict[str, Any]
    """Of prompts and responses, and of the learner's passes."""


SHAPES = {
    # TRL's LengthSampler(2, 8) and LengthSampler(4, 16) never draw the upper bound
    "notebook": Shape(32, 10, {"prompts.max_tokens": 7, "rollout.max_response_tokens": 15}),
    "chat": Shape(
        16,
        5,
        {
            "prompts.min_chars": 1000,
            "prompts.min_tokens": 64,
            "prompts.max_tokens": 128,
            "rollout.min_response_tokens": 64,
            "rollout.max_response_tokens": 64,
            "learner.microbatch_tokens": 4096,  # one pass holds the batch, as TRL's does
        },
    ),
}
"""By name: TRL's sentiment notebook, and prompts and responses as long as a short chat's."""

_DEMOS = ("learning_rate", "warmup_steps", "value_learning_rate", "epochs", "kl_coef", "max_grad_norm")

_SECONDS = {
    "generation": ("time/generate_s",),
    "scoring": ("time/score_s",),
    "forward": ("time/old_s",),
    "update": ("time/update_s",),
    "sync": ("time/publish_s", "time/sync_s"),
}
_FIGURES = {
    "score": "score/mean",
    "kl": "kl/per_sequence",
    "policy_loss": "loss/policy",
    "value_loss": "loss/value",
}


def run_config(asked: Settings, seed: int, folder: Path, arm: str = OURS) -> Config:
    """Return the config of an arm's run: the demo's models and workers, a shape's lengths, the notebook's algorithm."""
    notebooks = UpdateConfig(learning_rate=1.41e-5)
    options = {
        **{f"ppo.{name}": getattr(notebooks, name) for name in _DEMOS},
        "model.value_head_init": "random",
        "seed": seed,
        "steps": asked.steps,
        "output_dir": folder,
        "rollout.batch_size": asked.batch_size,
        **SHAPES[asked.shape].options,
        "evaluation.num_prompts": 0,
        "checkpoint.every_steps": 0,
        "rollout.threads": asked.threads,
        "reward.threads": asked.threads,
        "learner.threads": asked.threads,
    }
    if arm == OURS_BFLOAT16:
        options |= {"model.dtype": "bfloat16", "rollout.dtype": "bfloat16"}
    texts = {key: "null" if value is None else value for key, value in options.items()}
    return load_config(CONFIG, [f"{key}={value}" for key, value in texts.items()] + asked.overrides)


def read_steps(run: Path) -> list[Step]:
    """Read the steps that a run has made so far."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    records = [json.loads(line) for line in lines]
    return [_step(record, run) for record in records if "event" not in record]


def _step(record: dict[str, float], run: Path) -> Step:
    table = pq.read_table(run / "trajectories" / f"step-{int(record['step']):05d}.parquet")
    lengths = [trajectory.lengths(table, name).tolist() for name in ("prompt_ids", "response_ids")]
    return Step(
        seconds={phase: sum(record.get(name, 0.0) for name in names) for phase, names in _SECONDS.items()},
        total_s=record["time/step_s"],
        lengths=list(zip(*lengths, strict=True)),
        figures={figure: record[name] for figure, name in _FIGURES.items()},
        mismatch=record["mismatch/kl"],
    )
