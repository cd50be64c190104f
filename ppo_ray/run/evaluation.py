"""Held-out prompts: what a policy makes of them, in a run and of a checkpoint."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ppo_ray import atomic
from ppo_ray.config import Config
from ppo_ray.models.loading import load_tokenizer, load_vocab_size
from ppo_ray.prompts.stream import PromptBatch, PromptStream
from ppo_ray.reward.group import RewardGroup
from ppo_ray.rollout.group import RolloutGroup


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what the policy made of it."""

    prompt: str
    response: str
    score: float | None
    """None: it could not be scored."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one response to each held-out prompt."""

    mean_score: float
    """Over the scored responses; NaN if there is none."""
    std_score: float
    """Sample standard deviation over them; NaN if there are fewer than two."""
    num_prompts: int
    num_unscored: int
    """Prompts whose response could not be scored; they are in neither figure above."""
    kl_per_sequence: float | None
    """KL to the reference, nats summed over a response; None: not measured."""
    samples: tuple[Sample, ...]
    """The first prompts, to be looked at."""

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        atomic.write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**fields | {"samples": tuple(Sample(**sample) for sample in fields["samples"])})


EVALUATION_SEED = -1  # no run has it: held-out responses are drawn alike before and after, and in every run


def evaluate(rollout: RolloutGroup, reward: RewardGroup, held_out: PromptBatch, config: Config) -> Evaluation | None:
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
        kl_per_sequence=None,
        samples=tuple(Sample(**row) for row in rows),
    )


def prompt_stream(config: Config) -> PromptStream:
    """Open the prompts with the policy's own tokenizer."""
    tokenizer: Any = load_tokenizer(config.model.path, config.model.trust)
    vocab_size = load_vocab_size(config.model.path, config.model.trust)
    return PromptStream(config.prompts, tokenizer, config.seed, config.evaluation.num_prompts, vocab_size=vocab_size)
