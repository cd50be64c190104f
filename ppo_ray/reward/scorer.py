"""All that scores of a config: its one reward, or its parts."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ppo_ray.config import Config, RewardConfig, RewardSource
from ppo_ray.reward.function import RewardFunction
from ppo_ray.reward.http import RewardServer

if TYPE_CHECKING:
    from ppo_ray.reward.classifier import Classifier


@runtime_checkable
class SampleScorer(Protocol):
    """What scores responses by more than their text: a function or a server."""

    failure: str | None
    """Why the first response without a score in the last `score` has none; None: every one has one."""

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """Names of the values that it is given; None: prompts and responses alone."""
        ...

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] = types.MappingProxyType({}),
    ) -> list[float | None]:
        """Score responses, in order; None stands for one that has no score.

        Args:
            prompts: texts.
            responses: texts.
            columns: what else there is of each response, a sequence per name.
        """
        ...


class Scorer:
    """The classifiers, functions and servers of a config."""

    def __init__(self, config: Config) -> None:
        """Load the classifiers, import the functions, read the servers' tokens.

        Raises:
            InputError: one of them cannot be used.
        """
        kept = config.prompts.kept_names
        self._scorers = [_make_scorer(key, source, config.reward, kept) for key, source in config.reward.sources]
        self.truncated: list[bool] | None = None
        """Whether a classifier saw only the end of each text of the last `score`; None: no classifier scores."""
        self.failure: str | None = None
        """Why a text of the last `score` has no score; None: every one has one."""

    @property
    def arguments(self) -> set[str]:
        """Names of what functions and servers are given beside prompts and responses, where there is such."""
        given = [scorer.arguments or () for scorer in self._scorers if isinstance(scorer, SampleScorer)]
        return {name for names in given for name in names}

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        read: Callable[[Sequence[str]], Mapping[str, Sequence[Any]]],
    ) -> list[list[float | None]]:
        """Return each part's scores, one or None per response.

        Args:
            prompts: texts.
            responses: texts.
            read: returns what else there is of each response, for the names that a function or server takes.

        Raises:
            InputError: a function does not return a number or None per response, or a column cannot be sent.
        """
        parts: list[list[float | None]] = []
        self.truncated, self.failure = None, None
        for scorer in self._scorers:
            if isinstance(scorer, SampleScorer):
                parts.append(scorer.score(prompts, responses, read(scorer.arguments or ())))
            else:
                parts.append(
                    scorer.score([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
                )
                before = self.truncated or [False] * len(prompts)
                self.truncated = [any(pair) for pair in zip(before, scorer.truncated, strict=True)]
            self.failure = scorer.failure or self.failure
        return parts


def _make_scorer(
    key: str, source: RewardSource, reward: RewardConfig, kept: Sequence[str]
) -> "SampleScorer | Classifier":
    timeout_s = reward.timeout_s
    if source.function is not None:
        return RewardFunction(source.function, kept, key=key, max_concurrent=reward.max_concurrent, timeout_s=timeout_s)
    if source.url is not None:
        return RewardServer(source, kept, key=key, retries=reward.retries, timeout_s=timeout_s)
    from ppo_ray.reward.classifier import Classifier  # loads torch

    return Classifier(
        str(source.path),
        label=source.label,
        transform=source.transform,
        dtype=source.dtype,
        batch_size=source.batch_size,
        trust=source.trust,
    )
