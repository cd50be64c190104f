"""Evaluation of a policy on held-out prompts."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ppo_ray import atomic
from ppo_ray.checkpoint import read_record
from ppo_ray.config import Config
from ppo_ray.prompts.stream import PromptBatch
from ppo_ray.reward.group import RewardGroup
from ppo_ray.rollout.group import RolloutGroup


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the policy's response."""

    prompt: str
    response: str
    score: float | None
    """None: it could not be scored."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one response to each held-out prompt, in the unit of the reward."""

    mean_score: float
    """Mean over the scored responses; NaN if there is none."""
    std_score: float
    """Sample standard deviation over them; NaN if there are fewer than two."""
    num_prompts: int
    num_unscored: int
    """Prompts whose response could not be scored; mean and deviation leave them out."""
    samples: tuple[Sample, ...]
    """The first prompts (`evaluation.num_samples`), to be read by people."""

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        atomic.write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            CheckpointError: the file is not one of ours.
        """
        return read_record(cls, path)


EVALUATION_SEED = -1  # no run has this seed: held-out responses are sampled alike before and after, and in every run


def score_held_out(
    rollout: RolloutGroup, reward: RewardGroup, held_out: PromptBatch, config: Config
) -> Evaluation | None:
    """Score one response to every held-out prompt, each with its own fixed seed; None if none is held out."""
    if not held_out.sample_ids:
        return None
    scored = reward.score(rollout.generate(held_out, 0, EVALUATION_SEED))
    scores, rows = reward.summarize(scored, config.evaluation.num_samples)
    known = [score for score in scores if score is not None]
    return Evaluation(
        mean_score=statistics.fmean(known) if known else float("nan"),
        std_score=statistics.stdev(known) if len(known) > 1 else float("nan"),
        num_prompts=len(scores),
        num_unscored=len(scores) - len(known),
        samples=tuple(Sample(**row) for row in rows),
    )
