"""ppo_ray's arm: a whole `python -m ppo_ray train` by the demo's config, and what its metrics say.

Nothing is held out and no checkpoint is written during the steps; one is written at the end, as always, and removed.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.compare.arms import Step
from ppo_ray import trajectory
from ppo_ray.config import Config, UpdateConfig, load_config

CONFIG = Path(__file__).parents[2] / "configs" / "imdb.yaml"
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


def run_config(batch_size: int, steps: int, seed: int, threads: int, folder: Path, more: list[str]) -> Config:
    """Return the config of a run: the demo's models and workers, the notebook's lengths and algorithm."""
    notebooks = UpdateConfig(learning_rate=1.41e-5)
    options = {
        **{f"ppo.{name}": getattr(notebooks, name) for name in _DEMOS},
        "model.value_head_init": "random",
        "seed": seed,
        "steps": steps,
        "output_dir": folder,
        "rollout.batch_size": batch_size,
        "prompts.max_tokens": 7,  # TRL's LengthSampler(2, 8) and LengthSampler(4, 16) never draw the upper bound
        "rollout.max_response_tokens": 15,
        "evaluation.num_prompts": 0,
        "checkpoint.every_steps": 0,
        "rollout.threads": threads,
        "reward.threads": threads,
        "learner.threads": threads,
    }
    texts = {key: "null" if value is None else value for key, value in options.items()}
    return load_config(CONFIG, [f"{key}={value}" for key, value in texts.items()] + more)


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
    )
