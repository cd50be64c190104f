"""The options of scoring: one reward, or a weighted sum of several."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ppo_ray.config.file import Contradiction
from ppo_ray.config.sections import DType, ModelSource, Source


class RewardSource(ModelSource):
    """One thing that scores: a classifier or a Python function."""

    path: Source | None = None
    """Folder or hub name of a sequence classifier with its tokenizer, weights in safetensors. It scores prompt plus
    response. TRL: `reward_model`."""
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    """A Python function instead, as "package.module:function". It gets a list for each parameter, by its name: prompts,
    responses, messages, response_ids, finish_reasons, and the columns of `prompts.keep`. It returns a score (or None)
    per response. An `async def` gets one response's values instead."""
    label: str = "POSITIVE"
    """The classifier's label, by name, whose output is the score."""
    transform: Literal["logit", "softmax", "sigmoid"] = "logit"
    """What makes a score of the classifier's outputs: the label's raw output, its probability, or its own sigmoid."""
    dtype: DType = "float32"
    """That the classifier computes in."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per forward pass of the classifier."""


class RewardPart(RewardSource):
    """One of several things that are scored."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """In the metrics and in `trajectories/`. Required."""
    weight: float = 1.0
    """What its score is multiplied by."""


class RewardConfig(RewardSource):
    """What scores a response: a classifier (`path`), a Python function (`function`), or several of these (`parts`)."""

    parts: Annotated[tuple[RewardPart, ...], Field(strict=False)] = ()
    """Several rewards instead of one: a list of {name, weight, function or path, ...} with the options of this section
    from `path` to `batch_size`. The score is the weighted sum. A part without a score is left out of it; a response
    without any has none. The metrics have each part, `trajectories/` its score before the weight."""
    max_concurrent: int = Field(default=64, ge=1)
    """Most calls of an `async def` function at a time, per worker."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest call of an `async def` function, seconds; then its response has no score."""
    workers: int = Field(default=1, ge=1)
    """Reward actors; each scores the shards it is given."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per worker. workers x threads must not exceed the machine's CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker; a fraction lets actors share one."""
    max_unscored_steps: int = Field(default=3, ge=0)
    """Largest number of steps in a row without any score. Nothing is learnt in such a step. One step more ends the run,
    and the steps that were made are saved. 0: the first such step ends it."""

    @property
    def sources(self) -> tuple[tuple[str, RewardSource], ...]:
        """All that scores, each with the key of its options, e.g. `reward.parts[0]`."""
        parts = tuple((f"reward.parts[{index}]", part) for index, part in enumerate(self.parts))
        return parts or (("reward", self),)


def reward_contradictions(reward: RewardConfig) -> Iterator[Contradiction]:
    """Yield the contradictions of what scores."""
    if reward.parts and (reward.path is not None or reward.function is not None):
        yield Contradiction(
            ("reward.parts", "reward.path", "reward.function"),
            "stands instead of reward.path and reward.function: name these as further parts, or leave parts out",
        )
        return
    for key, source in reward.sources:
        if (source.path is None) == (source.function is None):
            yield Contradiction(
                ("reward.parts",) if reward.parts else ("reward.path", "reward.function"),
                f"give {key}.path (a classifier) or {key}.function (a Python function), "
                + ("one of them" if source.path is None else "not both"),
            )
    names = [part.name for part in reward.parts]
    if len(set(names)) < len(names):
        yield Contradiction(("reward.parts",), f"{', '.join(names)}: two parts have one name")
