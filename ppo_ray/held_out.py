"""Held-out prompts: what a policy makes of them, in a run and of a checkpoint."""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_ray import preflight
from ppo_ray.actors.launch import launch_scorers
from ppo_ray.actors.reward import RewardGroup
from ppo_ray.actors.rollout import RolloutGroup
from ppo_ray.actors.session import ray_session
from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.evaluation import Evaluation
from ppo_ray.models.loading import load_tokenizer, load_vocab_size
from ppo_ray.prompts import PromptBatch, PromptStream
from ppo_ray.report import print_evaluation

EVALUATION_SEED = -1  # no run has it: held-out responses are drawn alike before and after, and in every run


def evaluate(rollout: RolloutGroup, reward: RewardGroup, held_out: PromptBatch, config: Config) -> Evaluation | None:
    """Score one response to every held-out prompt, each with its own fixed seed; None if none is held out."""
    if not held_out.sample_ids:
        return None
    scored = reward.score(rollout.generate(held_out, 0, EVALUATION_SEED))
    scores, samples = reward.summarize(scored, config.evaluation.num_samples)
    known = [score for score in scores if score is not None]
    return Evaluation(
        mean_score=statistics.fmean(known) if known else float("nan"),
        std_score=statistics.stdev(known) if len(known) > 1 else float("nan"),
        num_prompts=len(scores),
        num_unscored=len(scores) - len(known),
        kl_per_sequence=None,
        samples=tuple(samples),
    )


def evaluate_checkpoint(checkpoint: Path, overrides: list[str], console: Console) -> None:
    """Score the held-out prompts with a checkpoint of a run, by the run's own config, and print them.

    Raises:
        InputError: it is no checkpoint of ours, or its config cannot be used here.
        WorkerError: an actor failed, was lost or was late.
    """
    source = checkpoint / "config.yaml"
    if not source.is_file():
        raise InputError(
            f"{checkpoint}: has no config.yaml, so it is no checkpoint of ppo_ray; "
            "give a folder like RUN/checkpoints/final"
        )
    config = load_config(source, [*overrides, f"model.path={checkpoint}"])
    preflight.check(config)
    held_out = prompt_stream(config).held_out()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with ray_session(config.ray), launch_scorers(config, say, lambda event: say(event.message)) as (rollout, reward):
        evaluation = evaluate(rollout, reward, held_out, config)
    if evaluation is None:
        raise InputError("evaluation.num_prompts=0: nothing is held out to be scored; set it to 1 or more")
    print_evaluation(console, evaluation)


def prompt_stream(config: Config) -> PromptStream:
    """Open the prompts with the policy's own tokenizer."""
    tokenizer: Any = load_tokenizer(config.model.path, config.model.trust)
    vocab_size = load_vocab_size(config.model.path, config.model.trust)
    return PromptStream(config.prompts, tokenizer, config.seed, config.evaluation.num_prompts, vocab_size=vocab_size)
