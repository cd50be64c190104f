"""What `benchmarks/gpu.py` measures: models by their sizes, batches by the lengths that others have published."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_batches import Range
from ppo_ray.config import Config


@dataclass(frozen=True)
class Work:
    """What a step works on."""

    model: str
    """A name of `random_models.SHAPES`."""
    batch_size: int
    """Responses per step."""
    prompts: Range
    responses: Range
    """Tokens."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the config, by `section.option`."""
    alone: bool = False
    """Whether the learner is measured without an engine, on responses that are drawn at random."""
    published_s: float | None = None
    """Seconds of a step that others have published, see `docs/internals.md`."""


WORKS = {
    "tiny": Work("tiny", 16, (2, 8), (4, 16)),
    "notebook": Work("notebook", 128, (2, 8), (4, 16), published_s=9.05),
    "0.5b": Work(
        "0.5b",
        256,
        (103, 103),
        (278, 278),
        {"model.critic": "separate", "ppo.epochs": 1, "ppo.minibatch_size": 64, "learner.microbatch_tokens": 16384},
        published_s=66.3,
    ),
    "1b": Work("1b", 128, (2, 8), (4, 16)),
    "1.5b": Work(
        "1.5b",
        128,
        (128, 128),
        (512, 512),
        {"ppo.epochs": 1, "learner.microbatch_tokens": 16384, "learner.gradient_checkpointing": True},
    ),
    "8b": Work(
        "8b",
        16,
        (1024, 1024),
        (1024, 1024),
        {
            "model.lora": {"rank": 16},
            "ppo.epochs": 1,
            "learner.microbatch_tokens": 8192,
            "learner.gradient_checkpointing": True,
        },
        alone=True,
    ),
}


def make_config(name: str, options: argparse.Namespace, folder: Path) -> Config:
    """Return the config of a run of one work, with what the command line changes in it."""
    work = WORKS[name]
    responses = (options.response_tokens,) * 2 if options.response_tokens else work.responses
    gpus = float(torch.cuda.is_available())
    sections: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "prompts": {"path": "none", "max_tokens": work.prompts[1]},
        "rollout": {
            "engine": "hf",
            "dtype": "bfloat16",
            "gpus": gpus,
            "batch_size": options.batch_size or work.batch_size,
            "min_response_tokens": responses[0],
            "max_response_tokens": responses[1],
            "max_context": max(512, work.prompts[1] + responses[1]),
        },
        "reward": {"function": "none:none"},
        "ppo": {},
        "learner": {"microbatch_tokens": 4096, "gpus": gpus},
    }
    for option, value in work.options.items():
        section, _, key = option.partition(".")
        sections[section][key] = value
    if options.batch_size and (size := sections["ppo"].get("minibatch_size")):  # as many mini-batches
        sections["ppo"]["minibatch_size"] = max(1, size * options.batch_size // work.batch_size)
    if options.microbatch_tokens:
        sections["learner"]["microbatch_tokens"] = options.microbatch_tokens
    return Config.model_validate(sections)
