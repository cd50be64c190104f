"""What a run's folder says of it, read without torch, Ray or a model: for pages that show a run, while it goes on too.

Nothing is trusted: a folder may be half-written, of another version, or a stranger's. What cannot be read is left out
and named in `notes`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ppo_ray.config import Config
from ppo_ray.config.explain import all_options, section_of
from ppo_ray.config.file import flatten, read_plain
from ppo_ray.errors import InputError, first_line
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.health import HealthCheck
from ppo_ray.run.log import read_actors, read_log

_LARGEST_JSON = 64 << 20  # bytes of an evaluation


@dataclass(frozen=True)
class Panel:
    """One chart of a run: metrics that belong together, over the steps."""

    group: str
    title: str
    names: tuple[str, ...]
    """Metrics, by the names of docs/diagnostics.md."""
    about: str
    """What the first of them is, as docs/diagnostics.md says it."""
    is_log: bool = False
    """Whether the scale is logarithmic."""


_RESIDENT = "resident memory of the largest process of its kind, GiB"
_RESERVED = "the most that torch held on its GPUs within the step, GiB"
PANELS = (
    Panel("Reward", "Score", ("score/mean", "eval/score_mean"), "scores as the reward gave them"),
    Panel("Reward", "Spread of the scores", ("score/std",), "scores as the reward gave them"),
    Panel(
        "Reward",
        "KL to the reference",
        ("kl/per_sequence",),
        "KL to the reference, summed over a response, nats, by `ppo.kl_estimator`",
    ),
    Panel("Reward", "Weight of the KL penalty", ("kl/coef",), "weight of the penalty in this step"),
    Panel("Responses", "Length", ("response/tokens_mean",), "length of responses, the end-of-sequence token included"),
    Panel("Responses", "Ended by themselves", ("response/eos_rate",), "share of responses that ended by themselves"),
    Panel("Responses", "Without a score", ("score/num_unscored",), "trajectories without a score, left out of the"),
    Panel(
        "Responses",
        "Engine against learner",
        ("mismatch/kl",),
        "KL of engine and learner, by k3, nats per token",
        is_log=True,
    ),
    Panel(
        "Policy",
        "Move per update",
        ("policy/approx_kl",),
        "how far the policy moved within the update: mean of d^2 / 2 and of -d, with d the log-ratio",
        is_log=True,
    ),
    Panel("Policy", "Clip fraction", ("policy/clip_fraction",), "share of tokens that the clip holds back"),
    Panel(
        "Policy",
        "Largest ratio",
        ("policy/ratio_max",),
        "probability ratios of tokens",
        is_log=True,
    ),
    Panel("Policy", "Entropy", ("policy/entropy",), "entropy of the policy's distributions, nats per token"),
    Panel("Policy", "Gradient norm", ("policy/grad_norm",), "gradient norm of the optimizer steps, before clipping"),
    Panel("Policy", "Policy loss", ("loss/policy",), "losses, mean over the mini-batches"),
    Panel(
        "Values",
        "Explained variance",
        ("value/explained_variance_before",),
        "1 - var(returns - values) / var(returns), before the update",
    ),
    Panel("Values", "Value loss", ("loss/value",), "losses, mean over the mini-batches", is_log=True),
    Panel(
        "Values",
        "Clip fraction of the values",
        ("value/clip_fraction",),
        "share of tokens whose value the clip holds back",
    ),
    Panel("Time", "Seconds per step", ("time/step_s",), "the whole step"),
    Panel("Time", "Generation", ("time/generate_s",), "generation; scoring; the learner's update"),
    Panel("Time", "Scoring", ("time/score_s",), "generation; scoring; the learner's update"),
    Panel("Time", "Learning", ("time/learn_s",), "generation; scoring; the learner's update"),
    Panel("Time", "Weights to the engines", ("time/sync_s",), "until every engine served them, verified"),
    Panel("Memory", "Memory of the learner", ("memory/learner_gib",), _RESIDENT),
    Panel("Memory", "Memory of rollout workers", ("memory/rollout_gib",), _RESIDENT),
    Panel("Memory", "Memory of reward workers", ("memory/reward_gib",), _RESIDENT),
    Panel("Memory", "GPU memory of the learner", ("memory/learner_gpu_reserved_gib",), _RESERVED),
    Panel("Memory", "GPU memory of rollout workers", ("memory/rollout_gpu_reserved_gib",), _RESERVED),
    Panel("Memory", "GPU memory of reward workers", ("memory/reward_gpu_reserved_gib",), _RESERVED),
)
"""The charts of a run, in the order in which they are looked at."""


@dataclass(frozen=True)
class Option:
    """An option of a run that is not what it is by default."""

    name: str
    value: Any
    default: Any
    """None where the option is required, or has no default."""


@dataclass(frozen=True)
class RunRecord:
    """What the files of one run's folder hold."""

    folder: RunFolder
    options: Mapping[str, Any]
    """Every option by its dotted name; empty where the config cannot be read."""
    steps: Sequence[Mapping[str, Any]]
    """Metrics of each step, by step; None for what was not finite."""
    events: Sequence[Mapping[str, Any]]
    """Events in order, each with its kind as `event`."""
    before: Mapping[str, Any] | None
    """Held-out prompts before the first step, as `Evaluation` has it; None: not evaluated, or not readable."""
    after: Mapping[str, Any] | None
    """The same after the last step."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What could not be read, and was left out."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run's folder.

        Raises:
            InputError: there is no run in it, or a file of it is a link that leads out of it.
        """
        folder = RunFolder(Path(path).absolute())
        if not folder.path.is_dir():
            raise InputError(f"{path}: no such folder; give the output_dir of a run")
        if not folder.holds_run():
            raise InputError(f"{path}: holds no run (no {folder.config.name}, no {folder.metrics.name})")
        notes: list[str] = []
        files = (folder.metrics, folder.config, folder.before, folder.after)
        for file in (file for file in files if not folder.holds(file)):
            raise InputError(f"{file}: is a link that leads out of the run's folder, which is not followed")
        steps, events, num_foreign = read_log(folder.path)
        if num_foreign:
            notes.append(f"{folder.metrics.name}: {num_foreign} lines cannot be read and are left out")
        options: Mapping[str, Any] = {}
        try:
            options = read_plain(folder.config)
        except InputError as error:
            notes.append(f"the config is left out: {first_line(error)}")
        before, after = (_read_evaluation(file, notes) for file in (folder.before, folder.after))
        return cls(folder, options, steps, events, before, after, notes)

    @property
    def num_planned(self) -> int | None:
        """Steps that the run is to make; None where the config does not say."""
        steps = self.options.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def health(self) -> HealthCheck:
        """The judgement of the run's steps; by the ranges of the default loss where the config cannot be read."""
        loss, steps = (self.options.get(f"ppo.{name}") for name in ("policy_loss", "value_warmup_steps"))
        return HealthCheck(loss if isinstance(loss, str) else "clip", steps if isinstance(steps, int) else 0)

    def describe(self) -> dict[str, str]:
        """Return what was trained, on what, for what: words by words."""
        get = self.options.get
        parts = get("reward.parts") or []
        if isinstance(parts, list) and parts:
            reward = ", ".join(str(part.get("name")) for part in parts if isinstance(part, dict))
        else:
            scorers = (get(f"reward.{key}") for key in ("function", "url", "path", "judge.path"))
            reward = next((str(scorer) for scorer in scorers if scorer), "")
        facts = {
            "model": get("model.path"),
            "prompts": get("prompts.path"),
            "reward": reward,
            "steps": f"{len(self.steps)} of {self.num_planned}" if self.num_planned else len(self.steps),
            "responses per step": get("rollout.batch_size"),
            "learning rate": get("ppo.learning_rate"),
            "engine": get("rollout.engine"),
            "seed": get("seed"),
        }
        return {name: str(value) for name, value in facts.items() if value not in (None, "")}

    def find_changes(self) -> list[Option]:
        """Return the options that differ from their defaults, the required ones among them."""
        defaults = dict(_defaults())
        return [
            Option(name, value, defaults.get(name))
            for name, value in self.options.items()
            if name not in defaults or value != defaults[name]
        ]

    def find_unhealthy(self) -> list[dict[str, Any]]:
        """Return each figure that left its healthy range: `name`, `range`, `remedy`, `steps` (numbers of the steps)."""
        health, found = self.health, dict[str, list[int]]()
        for metrics in self.steps:
            known = {name: value for name, value in metrics.items() if value is not None}
            for name in health.find_outside(known):
                found.setdefault(name, []).append(metrics["step"])
        return [
            {"name": name, "range": str(limits), "remedy": limits.remedy, "steps": found[name]}
            for name, limits in health.ranges.items()
            if name in found
        ]

    def find_actors(self) -> list[dict[str, Any]]:
        """Return each actor of the newest step that tells them: `name`, `host`, figures, the most memory of the run."""
        known = read_actors(self.folder.path) if self.folder.holds(self.folder.actors) else {}
        most: dict[str, dict[str, float]] = {}
        for actors in known.values():
            for name, figures in actors.items():
                own = most.setdefault(name, {})
                for key in (key for key in figures if key.startswith("memory/")):
                    own[key] = max(figures[key], own.get(key, 0.0))
        newest = known[max(known)] if known else {}
        return [{"name": name, **newest[name], **most[name]} for name in sorted(newest)]

    def find_held_out(self) -> list[tuple[int, Mapping[str, float]]]:
        """Return the figures of every evaluation, `eval/...` by name, with the number of steps done before it."""
        found: dict[int, Mapping[str, float]] = {}
        for metrics in self.steps:
            figures = {name: value for name, value in metrics.items() if name.startswith("eval/")}
            if figures:
                found[metrics["step"]] = figures
        for step, evaluation in ((0, self.before), (len(self.steps), self.after)):
            if evaluation is not None:
                figures = {"eval/score_mean": evaluation["mean_score"], **evaluation["figures"]}
                found[step] = {name: value for name, value in figures.items() if _is_finite(value)}
        return sorted(found.items())


def _defaults() -> Iterator[tuple[str, Any]]:
    """Yield every option that has a default, by its dotted name, as a config file would hold it."""
    for name, option in all_options(Config):
        may_be_null = option.default is None  # as a section may that is off by default
        if (section_of(option) is None or may_be_null) and not option.is_required():
            default = option.get_default(call_default_factory=True)
            if isinstance(default, Mapping) and default:
                yield from flatten(default, f"{name}.")
            else:
                yield name, list(default) if isinstance(default, tuple) else default


def _read_evaluation(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Read an evaluation as it was written; None where there is none, or what is there is none."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
        samples = [
            {"prompt": str(row["prompt"]), "response": str(row["response"]), "score": _number(row["score"])}
            for row in found["samples"]
        ]
        numbers = {name: _number(found[name]) for name in ("mean_score", "std_score", "num_prompts", "num_unscored")}
        figures = {str(name): float(value) for name, value in found.get("figures", {}).items() if _is_finite(value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {first_line(error)}")
        return None
    return {**numbers, "figures": figures, "samples": samples}


def _number(value: Any) -> float | None:
    return value if _is_finite(value) else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
