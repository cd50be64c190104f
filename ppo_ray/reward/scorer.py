"""All that scores of a config: its one reward, or its parts."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ppo_ray.config import Config, RewardConfig, RewardSource
from ppo_ray.errors import InputError
from ppo_ray.reward.function import RewardFunction
from ppo_ray.reward.http import RewardServer
from ppo_ray.reward.judge import Judge, StartJudge

Read = Callable[[Sequence[str]], Mapping[str, Sequence[Any]]]
"""Returns what there is of each response beside prompt and response, for the names that a function or server takes."""

_MOST_WAITING = 64  # threads that wait for servers and `async def` functions


@dataclass(frozen=True)
class Scored:
    """The scores of a batch."""

    parts: list[list[float | None]]
    """Each part's, one or None per response."""
    truncated: list[bool] | None
    """Whether a classifier saw only the end of each text; None: no classifier scores."""
    failure: str | None
    """Why a text has no score; None: every one has one."""


class Scorer:
    """The classifiers, functions, servers and judges of a config.

    `score` may be called from several threads. Servers and `async def` functions are asked at once, for all parts and
    batches: they wait for others. Classifiers, judges and plain functions have one batch at a time.
    """

    def __init__(self, config: Config, start_judge: StartJudge | None = None) -> None:
        """Load the classifiers and judges, import the functions, read the servers' tokens.

        Args:
            config: names them.
            start_judge: loads a judge; None: there is none.

        Raises:
            InputError: one of them cannot be used.
        """
        kept = config.prompts.kept_names
        self._scorers = [
            _make_scorer(key, source, config.reward, kept, start_judge) for key, source in config.reward.sources
        ]
        self._at_work = threading.Lock()
        self._threads = ThreadPoolExecutor(_MOST_WAITING, "reward")

    @property
    def arguments(self) -> set[str]:
        """Names of what functions and servers are given beside prompts and responses, where there is such."""
        return {name for scorer in self._scorers for name in scorer.arguments or ()}

    def score(self, prompts: Sequence[str], responses: Sequence[str], read: Read) -> Scored:
        """Score a batch.

        Args:
            prompts: texts.
            responses: texts.
            read: returns what else there is of each response.

        Raises:
            InputError: a function does not return a number or None per response, or a column cannot be sent.
        """
        scorers = [copy.copy(scorer) if _waits(scorer) else scorer for scorer in self._scorers]  # a failure is its own
        asked = {
            number: self._threads.submit(_ask, scorer, prompts, responses, read)
            for number, scorer in enumerate(scorers)
            if _waits(scorer)
        }
        parts: dict[int, list[float | None]] = {}
        truncated: list[bool] | None = None
        failures: dict[int, str | None] = {}
        if len(asked) < len(scorers):
            with self._at_work:
                for number, scorer in enumerate(scorers):
                    if number not in asked:
                        parts[number] = _ask(scorer, prompts, responses, read)
                        failures[number] = scorer.failure
                        if not isinstance(scorer, RewardFunction | Judge):
                            before = truncated or [False] * len(prompts)
                            truncated = [any(pair) for pair in zip(before, scorer.truncated, strict=True)]
        for number, answer in asked.items():  # each has a limit of its own
            parts[number] = answer.result()
            failures[number] = scorers[number].failure
        reasons = [failures[number] for number in range(len(scorers)) if failures[number]]
        return Scored([parts[number] for number in range(len(scorers))], truncated, reasons[-1] if reasons else None)


def _waits(scorer: Any) -> bool:
    """Say whether a scorer waits for others rather than works."""
    return isinstance(scorer, RewardServer) or (isinstance(scorer, RewardFunction) and scorer.is_async)


def _ask(scorer: Any, prompts: Sequence[str], responses: Sequence[str], read: Read) -> list[float | None]:
    if isinstance(scorer, RewardFunction | RewardServer):
        return scorer.score(prompts, responses, read(scorer.arguments or ()))
    if isinstance(scorer, Judge):
        return scorer.score(prompts, responses, read((*scorer.arguments, "messages")))
    texts: list[Any] = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    if scorer.arguments:  # a classifier with a chat template
        chats = zip(read(scorer.arguments)["messages"], responses, strict=True)
        texts = [[*messages, {"role": "assistant", "content": answer}] for messages, answer in chats]
    scores: list[float | None] = scorer.score(texts)
    return scores


def _make_scorer(
    key: str, source: RewardSource, reward: RewardConfig, kept: Sequence[str], start_judge: StartJudge | None
) -> Any:
    timeout_s = reward.timeout_s
    if source.function is not None:
        return RewardFunction(source.function, kept, key=key, max_concurrent=reward.max_concurrent, timeout_s=timeout_s)
    if source.url is not None:
        return RewardServer(source, kept, key=key, retries=reward.retries, timeout_s=timeout_s)
    if source.judge is not None:
        from ppo_ray.models.loading import load_tokenizer  # loads torch

        if start_judge is None:
            raise InputError("reward.judge: there is nothing here that starts a judge")
        tokenizer = load_tokenizer(source.judge.path, source.judge.trust)
        return Judge(source.judge, kept, tokenizer, start_judge(source.judge))
    from ppo_ray.reward.classifier import Classifier  # loads torch

    return Classifier(
        str(source.path),
        label=source.label,
        transform=source.transform,
        dtype=source.dtype,
        batch_size=source.batch_size,
        batch_tokens=source.batch_tokens,
        chat_template=source.chat_template,
        trust=source.trust,
    )
