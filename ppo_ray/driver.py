"""The loop of PPO over Ray actors, and what stands before and after it."""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_ray import preflight
from ppo_ray.actors.launch import Actors, launch, launch_scorers
from ppo_ray.actors.reward import RewardGroup
from ppo_ray.actors.rollout import RolloutGroup
from ppo_ray.actors.session import ray_session
from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.evaluation import Evaluation
from ppo_ray.metrics import MetricsLog
from ppo_ray.models.loading import load_tokenizer
from ppo_ray.prompts import PromptBatch, PromptStream
from ppo_ray.report import StepProgress, draw_curves, print_evaluation, print_summary, write_samples
from ppo_ray.run_folder import RunFolder

EVALUATION_SEED = -1  # no run has it: held-out responses are drawn alike before and after, and in every run

Metrics = dict[str, float]


def train(config: Config, console: Console) -> None:
    """Train a policy as the config says, and leave everything about it in `output_dir`.

    Raises:
        InputError: something in the config cannot be used; nothing was started or written.
        WorkerError: an actor failed, was lost or was late.
    """
    preflight.check(config)
    prompts = prompt_stream(config)
    folder = RunFolder.create(config.output_dir)
    folder.write_config(config)
    with ray_session(config.ray), launch(config, folder.trajectories, console.print) as actors:
        before = evaluate(actors.rollout, actors.reward, prompts.held_out(), config)
        history = run_steps(config, prompts, actors, folder, console)
        actors.learner.save(folder.final_checkpoint)
        after = evaluate(actors.rollout, actors.reward, prompts.held_out(), config)
    folder.write_config(config, folder.final_checkpoint)
    if before and after:
        write_samples(folder.samples, before, after)
    draw_curves(folder.curves, history, before, after)
    print_summary(console, folder, history, before, after)


def run_steps(
    config: Config, prompts: PromptStream, actors: Actors, folder: RunFolder, console: Console
) -> list[Metrics]:
    """Run PPO: sample, score, update, broadcast, for `config.steps` steps; returns each step's metrics.

    The driver holds references: what it reads of a step is a few floats.
    """
    history: list[Metrics] = []
    with MetricsLog(folder.path) as log, StepProgress(config.steps, console) as progress:
        for step in range(config.steps):
            batch = prompts.take(config.rollout.batch_size)  # sample ids and token ids, in order
            trajectories = actors.rollout.generate(batch, step)  # references, in order, at once
            scored = actors.reward.score(trajectories)  # a shard is scored as soon as it is generated
            update = actors.learner.update(scored, step)  # one PPO update on the whole batch
            synced = actors.rollout.load_weights(update.weights)  # all engines acknowledge version and checksum
            history.append(log.write(step, update.metrics | synced))
            progress.update(step, history[-1])
            if step == 0 and not update.metrics["learner/skipped_update"]:
                say_sanity(console, history[0])
    return history


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
    with ray_session(config.ray), launch_scorers(config, console.print) as (rollout, reward):
        evaluation = evaluate(rollout, reward, held_out, config)
    if evaluation is None:
        raise InputError("evaluation.num_prompts=0: nothing is held out to be scored; set it to 1 or more")
    print_evaluation(console, evaluation)


def prompt_stream(config: Config) -> PromptStream:
    """Open the prompts with the policy's own tokenizer."""
    tokenizer: Any = load_tokenizer(config.model.path)
    return PromptStream(config.prompts, tokenizer, config.seed, config.evaluation.num_prompts)


def say_sanity(console: Console, metrics: Metrics) -> None:
    """Print what must hold at the first step if engines, learner and reference compute the same policy."""
    console.print(
        "step 0 sanity: "
        f"|rollout - learner| log-probability {metrics['mismatch/logprob_mean']:.1e} mean, "
        f"{metrics['mismatch/logprob_max']:.1e} max; "
        f"KL to the reference {metrics['kl/per_sequence']:.1e}; "
        f"ratio of the first mini-batch 1{metrics['policy/ratio_first'] - 1:+.1e}"
    )
