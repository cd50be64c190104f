"""Evaluation of a policy on held-out prompts: its figures, and samples to be read by people."""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

from ppo_ray import atomic
from ppo_ray.checkpoint import read_record
from ppo_ray.config import Config, EvaluationConfig
from ppo_ray.learner.group import LearnerGroup
from ppo_ray.prompts.batch import PromptBatch
from ppo_ray.reward.group import RewardGroup
from ppo_ray.rollout.group import RolloutGroup
from ppo_ray.run.actors import Actors
from ppo_ray.run.progress import format_score
from ppo_ray.run.run import Run


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the policy's response."""

    prompt: str
    response: str
    score: float | None
    """None: it could not be scored."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of the responses to held-out prompts, in the unit of the reward."""

    mean_score: float
    """Mean over the scored responses; NaN if there is none."""
    std_score: float
    """Sample standard deviation over them; NaN if there are fewer than two."""
    num_prompts: int
    num_unscored: int
    """Responses that could not be scored; mean and deviation leave them out."""
    samples: tuple[Sample, ...]
    """The first prompts (`evaluation.num_samples`), to be read by people."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """All figures by the names that they have in a step's metrics, `eval/...`; see docs/diagnostics.md."""
    sets: Mapping[str, "Evaluation"] = field(default_factory=dict)
    """The same of each of `evaluation.sets`, with its own figures alone."""

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        atomic.write_text(path, self.to_json())

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            CheckpointError: the file is not one of ours.
        """
        return read_record(cls, path)


EVALUATION_SEED = -1  # no run has this seed: held-out responses are sampled alike before and after, and in every run


def score_held_out(
    rollout: RolloutGroup,
    reward: RewardGroup,
    held_out: Mapping[str, PromptBatch],
    config: Config,
    learner: LearnerGroup | None = None,
) -> Evaluation | None:
    """Score responses to all held-out prompts, each with its own fixed seed; None if none is held out.

    Args:
        rollout: the engines, which have the policy's weights.
        reward: what scores.
        held_out: the run's own under an empty name, and those of `evaluation.sets` by theirs.
        config: of the run.
        learner: computes the KL to the reference, by the same policy; None: that figure is left out.

    Returns:
        The evaluation of the run's own prompts, or of the first set where there are none; with all figures and sets.
    """
    options = config.evaluation
    found: dict[str, Evaluation] = {}
    for name, prompts in held_out.items():
        if not prompts.sample_ids:
            continue
        prefix = _prefix(name)
        num_prompts = options.sets[name].num_prompts if name else options.num_prompts
        asked = repeat_prompts(prompts, num_prompts, options.samples_per_prompt)
        asked = replace(asked, temperature=options.temperature)
        scored = reward.score(rollout.generate(asked, 0, EVALUATION_SEED, keep_weights=True))
        table, rows = reward.summarize(scored, min(options.num_samples, len(prompts.sample_ids)))
        figures = dict(summarize_evaluation(table, options, num_prompts, prefix))
        if learner is not None:
            figures[f"{prefix}kl_per_sequence"] = learner.measure_kl(scored)
        scores = [score for score in table.column("score").to_pylist() if score is not None]
        found[name] = Evaluation(
            mean_score=figures.get(f"{prefix}score_mean", math.nan),
            std_score=statistics.stdev(scores) if len(scores) > 1 else math.nan,
            num_prompts=len(prompts.sample_ids),
            num_unscored=table.num_rows - len(scores),
            samples=tuple(Sample(**row) for row in rows),
            figures=figures,
        )
    if not found:
        return None
    everything = {name: figure for one in found.values() for name, figure in one.figures.items()}
    sets = {name: one for name, one in found.items() if name}
    return replace(next(iter(found.values())), figures=everything, sets=sets)


def evaluate_now(run: Run, actors: Actors) -> Evaluation | None:
    """Evaluate the policy so far on all held-out prompts, and show the figures; None if none is held out."""
    options, held_out = run.config.evaluation, run.held_out
    sizes = {name: len(prompts.sample_ids) for name, prompts in held_out.items() if prompts.sample_ids}
    if not sizes:
        return None
    times = f", {options.samples_per_prompt} responses each" if options.samples_per_prompt > 1 else ""
    asked = ", ".join(f"{number} {name or 'held-out'}" for name, number in sizes.items())
    run.say(f"evaluating on {asked} prompts{times} ...")
    began = time.monotonic()
    found = score_held_out(actors.rollout, actors.reward, held_out, run.config, actors.learner)
    if found:
        lines = []
        for name in sizes:
            of_set = {key.removeprefix(_prefix(name)): figure for key, figure in found.figures.items()}
            rates = [f"{key} {rate:.3f}" for key, rate in of_set.items() if key.startswith("pass@")]
            score = format_score(of_set.get("score_mean"))
            lines.append(", ".join([f"{name or 'held-out'} mean score {score}", *rates]))
        run.say(f"after {run.state.step} steps: {'; '.join(lines)} ({time.monotonic() - began:.0f} s)")
    return found


def _prefix(name: str) -> str:
    """Return what the names of a set's figures begin with; an empty name: of the run's own held-out prompts."""
    return f"eval/{name}/" if name else "eval/"


def evaluate_when_due(run: Run, actors: Actors) -> None:
    """Evaluate the policy on held-out prompts every so many steps; before the first step that was done already."""
    every, step = run.config.evaluation.every_steps, run.state.step
    if not every or step % every:
        return
    known = step == 0 and run.folder.before.is_file()
    found = Evaluation.read(run.folder.before) if known else evaluate_now(run, actors)
    if found:
        run.note_evaluation(found.figures)


def repeat_prompts(held_out: PromptBatch, num_prompts: int, times: int) -> PromptBatch:
    """Return the prompts as often as each is answered, the first answers first, each under a sample id of its own.

    Args:
        held_out: its sample ids are from -1 to -num_prompts, some of them left out.
        num_prompts: most that there may be.
        times: answers to each.
    """
    columns = held_out.columns
    return PromptBatch(
        tuple(sample_id - turn * num_prompts for turn in range(times) for sample_id in held_out.sample_ids),
        held_out.prompt_ids * times,
        columns=None if columns is None else pa.concat_tables([columns] * times),
    )


def summarize_evaluation(
    table: pa.Table, options: EvaluationConfig, num_prompts: int, prefix: str = "eval/"
) -> Iterator[tuple[str, float]]:
    """Yield the figures of scored responses by name.

    Args:
        table: `sample_id`, `score`, `finish_reason`, `num_tokens`, and `parts` where the reward has several.
        options: how often each prompt was answered, and what passes.
        num_prompts: as in `repeat_prompts`.
        prefix: of the names.
    """
    score = table.column("score").drop_null()
    if len(score):
        yield f"{prefix}score_mean", pc.mean(score).as_py()
    if (error := standard_error(table, num_prompts)) is not None:
        yield f"{prefix}score_error", error
    yield f"{prefix}unscored", 1 - len(score) / table.num_rows
    yield f"{prefix}tokens_mean", pc.mean(table.column("num_tokens")).as_py()
    yield f"{prefix}eos_rate", table.column("finish_reason").to_pylist().count("stop") / table.num_rows
    parts = {}
    if "parts" in table.column_names:
        names = table.schema.field("parts").type.names
        parts = dict(zip(names, table.column("parts").flatten(), strict=True))
    for name, part in parts.items():
        if part.null_count < len(part):
            yield f"{prefix}{name}_mean", pc.mean(part).as_py()
    if options.pass_score is None:
        return
    values = parts[options.pass_part] if options.pass_part else table.column("score")
    passes: dict[int, list[bool]] = {}
    for sample_id, value in zip(table.column("sample_id").to_pylist(), values.to_pylist(), strict=True):
        if value is not None:
            passes.setdefault((-1 - sample_id) % num_prompts, []).append(value >= options.pass_score)
    k = 1
    while k <= options.samples_per_prompt:
        if (rate := pass_rate(list(passes.values()), k)) is not None:
            yield f"{prefix}pass@{k}", rate
        k *= 2


def standard_error(table: pa.Table, num_prompts: int) -> float | None:
    """Return the standard error of the mean score over the prompts: answers to one prompt are not independent.

    It is the standard deviation of the prompts' mean scores over the square root of their number. None: fewer than two
    prompts have a score.
    """
    scores: dict[int, list[float]] = {}
    for sample_id, score in zip(table.column("sample_id").to_pylist(), table.column("score").to_pylist(), strict=True):
        if score is not None:
            scores.setdefault((-1 - sample_id) % num_prompts, []).append(score)
    means = [statistics.fmean(found) for found in scores.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def pass_rate(passes: Sequence[Sequence[bool]], k: int) -> float | None:
    """Estimate pass@k, the share of prompts of which one of k answers passes: the mean of 1 - C(n-c, k) / C(n, k).

    n is the number of a prompt's answers, c of those that pass. The estimate has no bias. Chen et al. 2021 (arXiv
    2107.03374), eq. 1.

    Args:
        passes: for each prompt whether each answer passes; prompts with fewer than k answers are left out.
        k: answers that one has.

    Returns:
        The rate; None if no prompt has k answers.
    """
    rates = [
        1 - math.comb(len(answers) - sum(answers), k) / math.comb(len(answers), k)
        for answers in passes
        if len(answers) >= k
    ]
    return statistics.fmean(rates) if rates else None
